"""capnas in the slot of the side-by-side overhead benchmark: attach, values at the epoch's end, detach."""

from typing import ClassVar

from capnas.measures.moments import covariance
from capnas.measures.saturation import saturation
from capnas.recording import Recorder


class Capnas:
    """Recording as a search uses it: outputs of modules and blocks, sampled positions of every third step."""

    options: ClassVar = {"train_interval": 3}

    def __init__(self, model, seed=0):
        self.recorder = Recorder(model, seed=seed, **self.options)
        self.recorder.__enter__()

    def epoch_end(self):
        return {name: saturation(covariance(r.moments)) for name, r in self.recorder.pop("train").items()}

    def detach(self):
        self.recorder.__exit__(None, None, None)


class CapnasEveryRow(Capnas):
    """The same without sampling: every position of every batch of every step."""

    options: ClassVar = {"values_per_call": None, "train_interval": 1}
