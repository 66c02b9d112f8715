"""Pure maths of the capacity theories: tensors in, numbers out; no hooks, no models, no data sets.

Axis letters, the same in every module: ``B`` batch, ``S`` samples (rows), ``D`` features (width of a layer), ``L`` layers.
"""
