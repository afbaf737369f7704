"""``Int8Config``: what ``from_pretrained`` is to do, and what config.json says of a saved model."""

from collections.abc import Iterable
from dataclasses import fields

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixft.nn.int8_training import TrainingOptions
from mixft.nn.quant_linear import Mode, check_mode, check_outlier_threshold, training_options

QUANT_METHOD = "mixft"
SETTINGS = ("mode", "include", "exclude", "layers", "outlier_threshold")
TRAINING_SETTINGS = tuple(field.name for field in fields(TrainingOptions))


@register_quantization_config(QUANT_METHOD)
class Int8Config(QuantizationConfigMixin):
    """``from_pretrained(path, quantization_config=Int8Config(...))`` quantizes as it loads, one weight at a time.

    The layers are those that ``mixft.quantize_`` would take with the same arguments. In the modes ``"weight_only"`` and
    ``"dynamic"`` a saved model has int8 weights [out_features, in_features] under their usual names, ``X.weight``, and
    FP32 scales [out_features, 1] as ``X.weight_scale``. In ``"train"`` mode weights stay floating-point parameters and
    are saved as such, in a folder that loads without mixft too.

    Args:
        mode: ``"weight_only"``, ``"dynamic"`` or ``"train"``; see :class:`mixft.nn.QuantLinear`. A saved model may have
            ``"static"``, after ``mixft.calibrate`` and :func:`mark_quantized`.
        include: a glob of module names, or several; only those layers are taken.
        exclude: a glob of module names, or several; those layers are left.
        layers: the names of the layers that are quantized, relative to the base model: written by mixft, which chooses
            them when it loads floating-point weights, and read from the config.json of a saved model.
        outlier_threshold: in mode ``"dynamic"``, the magnitude above which a column of the input is multiplied in
            floating point; see :class:`mixft.nn.QuantLinear`.
        training: for mode ``"train"`` the fields of :class:`mixft.nn.int8_training.TrainingOptions`: ``backward``,
            ``stochastic``, ``shape_gating``, ``min_sqnr``; for the others those of
            :class:`mixft.nn.frozen_training.FrozenOptions`: ``backward``, ``min_sqnr``.

    Raises:
        TypeError: ``include``, ``exclude`` or ``layers`` is of another type, or an option that there is not.
        ValueError: an unknown mode; options that are for another; in :meth:`from_dict` a setting that this version
            of mixft does not know.
    """

    def __init__(
        self,
        mode: Mode = "dynamic",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        layers: Iterable[str] | None = None,
        outlier_threshold: float | None = None,
        **training,
    ):
        if mode != "static" or layers is None:
            check_mode(mode)
        check_outlier_threshold(outlier_threshold, mode)
        training_options(mode, training)
        self.quant_method = QUANT_METHOD
        self.mode = mode
        self.include = _names("include", include)
        self.exclude = _names("exclude", exclude)
        self.layers = _names("layers", layers)
        self.outlier_threshold = outlier_threshold
        self.__dict__.update(training)

    @property
    def training(self) -> dict:
        """The training options that were given."""
        return {name: value for name, value in self.__dict__.items() if name in TRAINING_SETTINGS}

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """The configuration that ``to_dict`` gave; ValueError for a setting that is unknown here."""
        known = {name: value for name, value in config_dict.items() if name != "quant_method"}
        unknown = known.keys() - {*SETTINGS, *TRAINING_SETTINGS}
        if unknown:
            raise ValueError(
                f"quantization_config has {sorted(unknown)}, which this version of mixft does not know; a newer one may"
            )
        return super().from_dict(known, return_unused_kwargs, **kwargs)


def _names(argument: str, value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a glob or several; it is {value!r}")
    return names
