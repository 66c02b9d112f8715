"""Built-in search spaces: one file, one define-by-run function ``space(trial, *, num_classes, in_chans, image_size)``."""
