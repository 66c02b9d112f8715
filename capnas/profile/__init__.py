"""Profile of a network: one row per layer and per block, from what was recorded of it.

`profile_model` runs a model once on given inputs; training hands over what its recorder saw (`Profile.from_records`). Both leave
the model as it was: weights, buffers, mode, gradients, hooks and random state.
"""

from __future__ import annotations

from capnas.profile.enriching import enrich, with_macs
from capnas.profile.initialization import at_default_initialization
from capnas.profile.reading import INITIALIZATIONS, profile_model
from capnas.profile.rows import MEASURES, VERSION, FieldReport, LayerProfile, Profile, averaged, skipped_modules

__all__ = [
    "INITIALIZATIONS",
    "MEASURES",
    "VERSION",
    "FieldReport",
    "LayerProfile",
    "Profile",
    "at_default_initialization",
    "averaged",
    "enrich",
    "profile_model",
    "skipped_modules",
    "with_macs",
]
