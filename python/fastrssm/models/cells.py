"""The recurrent cells of the RSSM as modules; their arithmetic is in the ops."""

import torch
from torch import Tensor, nn

from fastrssm.models.config import RSSMConfig
from fastrssm.ops import Layer


class LayerNormGRUCell(nn.Module):
    """Parameters of ln_gru_a: one product of [input, state], normalised over all gates."""

    def __init__(self, in_size: int, deter: int) -> None:
        """Build the layers."""
        super().__init__()
        self.input_layer = nn.Linear(in_size + deter, 3 * deter)
        self.norm = nn.LayerNorm(3 * deter)


class BlockLinear(nn.Module):
    """Parameters of a block-diagonal layer: weight [blocks, out, in], bias [blocks, out]."""

    def __init__(self, blocks: int, in_size: int, out_size: int) -> None:
        """Draw them as `nn.Linear` draws those of one block."""
        super().__init__()
        bound = in_size**-0.5
        self.weight = nn.Parameter(torch.empty(blocks, out_size, in_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(blocks, out_size).uniform_(-bound, bound))


class BlockGRUCell(nn.Module):
    """Parameters of block_gru; names of the layers as in DreamerV3 (2301.04104)."""

    def __init__(self, deter: int, stoch: int, action: int, *, width: int, blocks: int) -> None:
        """Build the layers."""
        super().__init__()
        own = deter // blocks
        self.dynin0 = nn.Linear(deter, width)
        self.dynin1 = nn.Linear(stoch, width)
        self.dynin2 = nn.Linear(action, width)
        self.dynhid = BlockLinear(blocks, own + 3 * width, own)
        self.dyngru = BlockLinear(blocks, own, 3 * own)
        self.dynin0norm = nn.RMSNorm(width, eps=1e-4)
        self.dynin1norm = nn.RMSNorm(width, eps=1e-4)
        self.dynin2norm = nn.RMSNorm(width, eps=1e-4)
        self.dynhidnorm = nn.RMSNorm(deter, eps=1e-4)

    def branches(self) -> tuple[Layer, ...]:
        """Return the layers before the gates in the form of the ops."""
        pairs = (
            (self.dynin0, self.dynin0norm),
            (self.dynin1, self.dynin1norm),
            (self.dynin2, self.dynin2norm),
        )
        inputs = [Layer(linear.weight, linear.bias, norm.weight) for linear, norm in pairs]
        weight, bias = self.dynhid.weight, self.dynhid.bias
        return *inputs, Layer(weight, bias, self.dynhidnorm.weight.view_as(bias))


RecurrentCell = nn.GRUCell | LayerNormGRUCell | BlockGRUCell


def build_cell(config: RSSMConfig, in_size: int, action_size: int) -> RecurrentCell:
    """Build the cell for inputs [stoch | action], or those of a layer before it, of `in_size`."""
    if config.cell == "torch_gru":
        return nn.GRUCell(in_size, config.deter)
    if config.cell == "ln_gru_a":
        return LayerNormGRUCell(in_size, config.deter)
    return BlockGRUCell(
        config.deter, config.stoch, action_size, width=config.hidden, blocks=config.blocks
    )


def cell_layers(cell: RecurrentCell) -> tuple[Layer, Layer | None, tuple[Layer, ...]]:
    """Return `cell_input`, `cell_state` and `branches` of the ops' weights."""
    if isinstance(cell, nn.GRUCell):
        state = Layer(cell.weight_hh, cell.bias_hh)
        return Layer(cell.weight_ih, cell.bias_ih), state, ()
    if isinstance(cell, LayerNormGRUCell):
        linear, norm = cell.input_layer, cell.norm
        return Layer(linear.weight, linear.bias, norm.weight, norm.bias), None, ()
    return Layer(cell.dyngru.weight, cell.dyngru.bias), None, cell.branches()


def any_parameter(cell: RecurrentCell) -> Tensor:
    """Return one parameter, for dtype and device."""
    if isinstance(cell, nn.GRUCell):
        return cell.weight_hh
    return cell.input_layer.weight if isinstance(cell, LayerNormGRUCell) else cell.dyngru.weight
