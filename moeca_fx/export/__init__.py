"""Export of a transformed model, caches as named inputs and outputs, and a runner that samples from the artefact."""

from moeca_fx.export.api import to_aotinductor, to_onnx, to_pt2, to_tensorrt
from moeca_fx.export.description import ArtefactDescription, describe_artefact
from moeca_fx.export.manifest import Manifest
from moeca_fx.export.runner import ExportedModel, load

__all__ = [
    "ArtefactDescription",
    "ExportedModel",
    "Manifest",
    "describe_artefact",
    "load",
    "to_aotinductor",
    "to_onnx",
    "to_pt2",
    "to_tensorrt",
]
