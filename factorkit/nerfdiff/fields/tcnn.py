"""A field of tiny-cuda-nn's: its hash grid, its spherical harmonics and its fully fused networks (Müller et al. 2022).

The package is on no index: https://github.com/NVlabs/tiny-cuda-nn says how to build it. Even its import needs a CUDA
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.nerfdiff.fields.grid import Field
from factorkit.utils.errors import ConfigError

COARSEST, LEVELS, LOG_ROWS, FEATURES = 8, 8, 15, 2  # of the hash grid, as our own has it
GEOMETRY = 16  # numbers that the first network answers: density, and what the second one reads beside the direction
SEEDS = 1 << 31


class TcnnField(Field):
    """Instant NGP's two networks: of the place in a hash grid to density and features, of features and direction to
    colour. It is not blurred by ``coarseness``.

    tiny-cuda-nn takes places in [0, 1] and answers in half precision where the GPU has it; its parameters are one flat
    fp32 vector a module. Its gradients are summed in no fixed order: a resumed run is not the same to the last bit.

    Args:
        resolution: cells of the finest level along each side.

    Raises:
        ConfigError: tiny-cuda-nn cannot be imported.
    """

    def __init__(self, resolution: int, seed: int = 0):
        super().__init__()
        tcnn = _tinycudann()
        coarsest = min(COARSEST, resolution)
        growth = (resolution / coarsest) ** (1 / (LEVELS - 1))
        grid = {
            "otype": "HashGrid",
            "n_levels": LEVELS,
            "n_features_per_level": FEATURES,
            "log2_hashmap_size": LOG_ROWS,
            "base_resolution": coarsest,
            "per_level_scale": growth,
        }
        way = {"otype": "SphericalHarmonics", "degree": 4}
        both = {"otype": "Composite", "nested": [{"n_dims_to_encode": 3, **way}, {"otype": "Identity"}]}
        self.geometry = tcnn.NetworkWithInputEncoding(3, GEOMETRY, grid, _network(1), seed=seed % SEEDS)
        self.color = tcnn.NetworkWithInputEncoding(3 + GEOMETRY - 1, 3, both, _network(2), seed=(seed + 1) % SEEDS)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """[M, 4] in fp32."""
        if not len(positions):  # its kernels take no empty batch
            return positions.new_zeros(0, 4)
        found = self.geometry((positions + 1) / 2).float()
        way = torch.nn.functional.normalize(directions, dim=1)
        color = self.color(torch.cat([(way + 1) / 2, found[:, 1:]], dim=1)).float()
        return torch.cat([found[:, :1], color], dim=1)


def _network(hidden: int) -> dict:
    return {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": 64,
        "n_hidden_layers": hidden,
    }


def _tinycudann():
    try:
        import tinycudann
    except (ImportError, OSError) as error:  # OSError: there is no CUDA device
        raise ConfigError(
            f'field="tcnn" needs tiny-cuda-nn and a CUDA device ({error}). Build it as '
            'https://github.com/NVlabs/tiny-cuda-nn says, or use field="hashgrid"'
        ) from error
    return tinycudann
