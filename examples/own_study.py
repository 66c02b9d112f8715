"""Objective is a plain callable: use it in a study of your own, with any sampler, storage or pruner of Optuna."""

import argparse

import optuna

import capnas

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--trials", type=int, default=3)
parser.add_argument("--epochs", type=int, default=1)
arguments = parser.parse_args()

objective = capnas.Objective("mbconv", "fashion-mnist-12k", values=("accuracy", "macs"), epochs=arguments.epochs, max_macs=2.5e6)
study = optuna.create_study(directions=objective.directions, sampler=optuna.samplers.NSGAIISampler(population_size=4, seed=0))
study.optimize(objective, n_trials=arguments.trials)

for trial in study.best_trials:
    found = capnas.Evaluation.of(trial)
    evenness = found.metrics["saturation_evenness"]
    print(f"trial {trial.number}: accuracy {trial.values[0]:.3f}, {int(trial.values[1]):,} MACs, evenness {evenness:.3f}")
