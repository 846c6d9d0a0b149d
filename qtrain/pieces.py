"""The steps of ``qtrain.quantize`` in one place, for those who want to do something between them (docs/pieces.md)."""

from qtrain.convert.calibrate import calibrate as calibrate
from qtrain.convert.fold import fold_batchnorm_ as fold_batchnorm_
from qtrain.convert.fold import fold_in_training_ as fold_in_training_
from qtrain.convert.layers import find_layers as find_layers
from qtrain.convert.operations import expose_operations as expose_operations
from qtrain.convert.plan import LayerPlan as LayerPlan
from qtrain.convert.plan import Policy as Policy
from qtrain.convert.plan import plan_layers as plan_layers
from qtrain.convert.swap import swap_layers as swap_layers
from qtrain.convert.switch import switch_bits_ as switch_bits_
from qtrain.observers.min_max import MinMax as MinMax
from qtrain.observers.percentile import Percentile as Percentile
from qtrain.observers.squared_error import SquaredError as SquaredError
from qtrain.ptq.bias_correction import FromBatches as FromBatches
from qtrain.ptq.equalize import CrossLayerEqualization as CrossLayerEqualization
from qtrain.ptq.rounding.adaround import AdaRound as AdaRound
from qtrain.ptq.rounding.brecq import BRECQ as BRECQ
from qtrain.ptq.rounding.qdrop import QDrop as QDrop
from qtrain.quantizers.base import Quantizer as Quantizer
from qtrain.quantizers.uniform.affine import Affine as Affine
from qtrain.quantizers.uniform.lsq import LSQ as LSQ
from qtrain.spec import LayerBits as LayerBits
from qtrain.spec import PerChannel as PerChannel
from qtrain.spec import PerTensor as PerTensor
