"""The embedded text-to-image model: drawn scenes, words, weights, training."""

from scfg.shapes.model import ShapesModel, load_shapes_model

__all__ = ["ShapesModel", "load_shapes_model"]
