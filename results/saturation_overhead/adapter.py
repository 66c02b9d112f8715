"""capnas in the slot of the side-by-side overhead benchmark: attach, values at the epoch's end, detach."""

from capnas.measures.moments import covariance
from capnas.measures.saturation import saturation
from capnas.recording import Recorder


class Capnas:
    """Recording as a search uses it: module outputs, sampled positions."""

    values_per_call = 2**17

    def __init__(self, model, seed=0):
        self.recorder = Recorder(model, reading="modules", values_per_call=self.values_per_call, seed=seed)
        self.recorder.__enter__()

    def epoch_end(self):
        return {name: saturation(covariance(r.moments)) for name, r in self.recorder.pop("train").items()}

    def detach(self):
        self.recorder.__exit__(None, None, None)


class CapnasEveryRow(Capnas):
    """The same without sampling: every position of every batch."""

    values_per_call = None
