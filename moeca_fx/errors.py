"""Exceptions. Every message says what failed, where, what was expected, what was found and what to do."""

from moeca_fx.reasons import Reason


class MoecaError(Exception):
    """Base of every error that this package raises on purpose; the command line turns it into exit code 2.

    Attributes:
        code: the documented reason for which a model is refused (`moeca_fx.reasons`); None for every other error.
    """

    def __init__(self, *args: object, code: Reason | None = None) -> None:
        super().__init__(*args)
        self.code = code


class ConfigError(MoecaError, ValueError):
    """A policy or option field is out of range."""


class InputError(MoecaError, ValueError):
    """Example or run-time inputs do not fit the model (wrong shape, dtype, count, or not finite)."""


class NoMoEFoundError(MoecaError):
    """The model holds no mixture-of-experts layer, or none that could be proven."""


class UnprovenRegionError(MoecaError):
    """A candidate mixture-of-experts region failed its numerical proof."""


class UnsupportedModelError(MoecaError):
    """The model is in a state that cannot be transformed (training mode, hooks, quantised experts, ...)."""


class CaptureError(MoecaError):
    """Tracing the model failed, or the captured graph differs from the model."""


class PassError(MoecaError):
    """A graph pass failed or left an illegal graph; names the pass and the passes before it."""


class OutOfMemoryError(MoecaError, MemoryError, RuntimeError):
    """A step ran out of memory; says what the caches take and which options lower that. The model stays usable."""


class ExportError(MoecaError):
    """A model or policy has no form for export, or an artefact and its manifest do not fit together."""


class WeightsError(MoecaError):
    """A weights file or hub entry is missing, corrupt or does not fit the model."""


class TargetError(MoecaError):
    """A command-line TARGET names neither a zoo model nor an importable factory."""


class TargetNotMetError(MoecaError):
    """A search ended without a policy within its target; says the best that was found."""


class MissingExtraError(MoecaError, ImportError):
    """An optional dependency is not installed; names the extra that brings it."""


def require(module: str, extra: str) -> None:
    """Raise `MissingExtraError` unless `module` can be imported.

    Args:
        module: the importable name, e.g. ``"safetensors.torch"``.
        extra: the extra of this package that installs it, e.g. ``"demo"``.
    """
    import importlib

    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed; "
            f"run: pip install 'moeca_fx[{extra}]'"
        ) from error
