"""Export of an encoder for other runtimes: ONNX, and the programs of torch.export.

The exported path is the plain one, every image whole and as long as the others, without the packed rows of training.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fastjepa.errors import UserError
from fastjepa.model.positions import interpolated_positions
from fastjepa.model.rotary import Rotation, grid_rotation
from fastjepa.model.vit import Attention, turned_heads
from fastjepa.weights.pretrained import PretrainedEncoder

OPSET = 20  # the first with GELU


class WholeImages(nn.Module):
    """The encoder over a batch (B, N, D), with the encoder's own parameters and names.

    Args:
        dynamic: positions follow the images' size, as the encoder's `other_positions` says; else they are its own.
    """

    def __init__(self, encoder: PretrainedEncoder, dynamic: bool = False):
        super().__init__()
        self.other_positions, self.antialias, self.grid = encoder.other_positions, encoder.antialias, encoder.grid
        if dynamic and not encoder.fixed_positions and self.other_positions != "interpolated":
            remedy = "export without --dynamic, or with --positions interpolated"
            raise UserError(f"{encoder.origin}: positions were learned for one size of image; {remedy}")
        self.patch_embed, self.blocks, self.norm = encoder.patch_embed, encoder.blocks, encoder.norm
        self.dynamic = dynamic
        self.head_dim = encoder.blocks[0].attn.head_dim if encoder.form_of_blocks.rotary else None
        self.register_buffer("pos_embed", None if self.head_dim else encoder.pos_embed)
        quarter = encoder.embed_dim // 4
        rate = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        self.register_buffer("rate", rate.float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, N, D) of images (B, C, H, W), normalised floats."""
        x = self.patch_embed.proj(images)  # (B, D, rows, columns)
        (rows, columns), rotation = x.shape[2:], None
        x = x.flatten(2).transpose(1, 2)
        if self.head_dim:
            rotation = grid_rotation(self.head_dim, (rows, columns), x.device)
        else:
            x = x + (self.positions(rows, columns) if self.dynamic else self.pos_embed)
        for block in self.blocks:
            x = x + masked_attention(block.attn, block.norm1(x), rotation)
            x = x + block.mlp(block.norm2(x))
        return self.norm(x)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the positions (rows * columns, D) that the encoder's own `positions` gives."""
        if self.other_positions == "interpolated":
            return interpolated_positions(self.pos_embed, self.grid, (rows, columns), self.antialias)[0]
        column, row = (self.axis_positions(n, trained) for n, trained in ((columns, self.grid[1]), (rows, self.grid[0])))
        shape = (rows, columns, column.shape[1])
        return torch.cat((column[None].expand(shape), row[:, None].expand(shape)), dim=2).flatten(0, 1)

    def axis_positions(self, count: int, trained: int) -> Tensor:
        """Return (count, D / 2): the sines and cosines of an axis that the trained grid cuts into `trained` patches."""
        places = torch.arange(count, device=self.rate.device)
        if self.other_positions == "scaled":
            places = (places + 0.5) * trained / count - 0.5  # as `scaled_coordinates`; exact where count is trained
        angle = places[:, None] * self.rate
        return torch.cat((angle.sin(), angle.cos()), dim=1)


def masked_attention(attention: Attention, x: Tensor, rotation: Rotation | None = None) -> Tensor:
    """Attend within each image of a batch (B, N, D), with the weights of a model's Attention."""
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).unbind(2)  # (B, N, H, d)
    q, k = turned_heads(q, attention.q_norm, rotation), turned_heads(k, attention.k_norm, rotation)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def size_ranges(encoder: PretrainedEncoder, dynamic: bool) -> tuple[tuple[Tensor], dict[str, dict[int, Dim]]]:
    """Return example images, and the sizes that may vary: the batch; if asked height and width, in two or more patches."""
    patch, (height, width) = encoder.patch_size, encoder.image_size
    example = torch.zeros(2, encoder.channels, height, width)
    if not dynamic:
        return (example,), {"images": {0: Dim("batch")}}
    # Two different sizes above 1: the tracer takes equal ones, and 1, for constants.
    example = torch.zeros(2, encoder.channels, 3 * patch, 5 * patch)
    return (example,), {"images": {0: Dim("batch"), 2: patch * Dim("rows"), 3: patch * Dim("columns")}}


def exported_program(encoder: PretrainedEncoder, dynamic: bool = False) -> ExportedProgram:
    """Return the encoder as a torch.export program: (B, C, H, W) normalised floats -> (B, N, D)."""
    example, shapes = size_ranges(encoder, dynamic)
    with torch.no_grad():
        return torch.export.export(WholeImages(encoder, dynamic).eval(), example, dynamic_shapes=shapes)


def write_export(path: Path, to: str, encoder: PretrainedEncoder, dynamic: bool = False) -> None:
    """Write `to`, pt2 or onnx; the encoder's form goes into the file's metadata under "fastjepa"."""
    form = json.dumps(encoder.form.to_dict())
    if to == "pt2":
        torch.export.save(exported_program(encoder, dynamic), path, extra_files={"fastjepa": form})
        return
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to onnx needs {error.name}; pip install 'fastjepa[onnx]'") from error
    made = torch.onnx.export(exported_program(encoder, dynamic), dynamo=True, opset_version=OPSET, verbose=False,
                             input_names=["images"], output_names=["features"])  # fmt: skip
    made.model.metadata_props["fastjepa"] = form
    made.save(path)
