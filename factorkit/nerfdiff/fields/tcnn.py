"""Hash grid and fused networks of tiny-cuda-nn (Müller et al. 2022).

The package is on no index: https://github.com/NVlabs/tiny-cuda-nn explains how to build it. Importing it needs a CUDA
device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.nerfdiff.fields.base import Field
from factorkit.utils.errors import ConfigError

COARSEST_RESOLUTION, LEVELS, LOG2_ROWS, FEATURES = 8, 8, 15, 2  # of the hash grid, as in HashField
GEOMETRY_OUTPUTS = 16  # outputs of the first network: density, and the features that the second network reads
MAX_SEED = 1 << 31


class TcnnField(Field):
    """Instant NGP's two networks: position to density and features, features and direction to colour.

    ``coarseness`` has no effect. tiny-cuda-nn takes positions in [0, 1] and computes in half precision where the GPU
    supports it. Its gradients are summed in no fixed order, so a resumed run is not bit-identical.

    Args:
        resolution: cells of the finest level along each side.
        seed: of the weights.

    Raises:
        ConfigError: tiny-cuda-nn cannot be imported.
    """

    def __init__(self, resolution: int, seed: int = 0):
        super().__init__()
        tcnn = _import_tinycudann()
        coarsest = min(COARSEST_RESOLUTION, resolution)
        grid = {
            "otype": "HashGrid",
            "n_levels": LEVELS,
            "n_features_per_level": FEATURES,
            "log2_hashmap_size": LOG2_ROWS,
            "base_resolution": coarsest,
            "per_level_scale": (resolution / coarsest) ** (1 / (LEVELS - 1)),
        }
        harmonics = {"n_dims_to_encode": 3, "otype": "SphericalHarmonics", "degree": 4}
        both = {"otype": "Composite", "nested": [harmonics, {"otype": "Identity"}]}
        network, inputs = tcnn.NetworkWithInputEncoding, 3 + GEOMETRY_OUTPUTS - 1
        self.geometry = network(3, GEOMETRY_OUTPUTS, grid, _network_config(1), seed=seed % MAX_SEED)
        self.color = network(inputs, 3, both, _network_config(2), seed=(seed + 1) % MAX_SEED)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] in fp32; see :class:`Field`."""
        if not len(positions):  # tiny-cuda-nn rejects empty batches
            return positions.new_zeros(0, 4)
        geometry = self.geometry((positions + 1) / 2).float()
        direction = F.normalize(directions, dim=1)
        color = self.color(torch.cat([(direction + 1) / 2, geometry[:, 1:]], dim=1)).float()
        return torch.cat([geometry[:, :1], color], dim=1)


def _network_config(hidden_layers: int) -> dict[str, Any]:
    return {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": 64,
        "n_hidden_layers": hidden_layers,
    }


def _import_tinycudann() -> Any:
    try:
        import tinycudann
    except (ImportError, OSError) as error:  # OSError: there is no CUDA device
        raise ConfigError(
            f'field="tcnn" needs tiny-cuda-nn and a CUDA device ({error}). Build it as '
            'https://github.com/NVlabs/tiny-cuda-nn explains, or use field="hashgrid"'
        ) from error
    return tinycudann
