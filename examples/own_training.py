"""A training of your own in a search: here images are mixed in pairs (mixup); saturation is recorded, and pruners stop it as usual."""

import argparse
import time

import optuna
import torch
from torch.nn.functional import cross_entropy

import capnas
from capnas.training import TrainingResult, evaluate


def mixup(model, data, config, *, image_size=None, on_epoch=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    torch.manual_seed(config.seed)
    curve, begin = [], time.perf_counter()
    with capnas.Recorder(model, seed=config.seed) as recorder:
        for epoch in range(1, config.epochs + 1):
            model.train()
            for x, y in data.batches("train", config.batch_size, epoch=epoch, seed=config.seed, image_size=image_size):
                share, order = torch.distributions.Beta(0.2, 0.2).sample(), torch.randperm(len(x))
                logits = model(share * x + (1 - share) * x[order])
                loss = share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[order])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            held_out = evaluate(model, data, "validation", image_size=image_size)
            profile = capnas.Profile.from_records(model, recorder.pop("eval"), mode="eval")
            curve.append({"epoch": epoch, "accuracy": held_out["accuracy"], "val_loss": held_out["loss"]})
            if on_epoch is not None and (reason := on_epoch(epoch, curve[-1], profile)) is not None:
                return TrainingResult(status="stopped", reason=reason, curve=tuple(curve), profile=profile)
    return TrainingResult(status="complete", curve=tuple(curve), profile=profile, seconds=time.perf_counter() - begin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3)
    given = parser.parse_args()
    images = capnas.load_data("fashion-mnist-12k", image_size=14)  # small ones: this is to show, not to find
    objective = capnas.Objective("mbconv", images, values=("accuracy", "saturation_evenness"), epochs=1, device="cpu", trainer=mixup)
    study = optuna.create_study(directions=objective.directions, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=given.trials)
    for trial in study.best_trials:
        print(f"trial {trial.number}: accuracy {trial.values[0]:.3f}, evenness {trial.values[1]:.3f}")
