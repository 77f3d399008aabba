"""Every preset and option takes its steps on a card without a wait, with all tensors on one device: on a fake card.

Networks are two blocks deep where a preset is large; widths, heads and images are the preset's own. Under torch.compile a
network is one graph over six ragged steps; in a CUDA graph's capture a wait raises.
"""

import pytest

from tests.support.card_cases import lasting_faults_of
from tests.support.places import CONFIGS
from tests.support.teachers import write_teacher

pytestmark = pytest.mark.slow

SHALLOW = "meta.depth=2 meta.pred_depth=2 data.batch_size=16"
SMALL = {name: "data.batch_size=32" for name in ("demo", "cifar10", "multiblock", "study", "salt")}
TINY = f"vit_base16 meta.model_name=vit_tiny meta.pred_emb_dim=96 {SHALLOW}"
PROJECTOR = "loss.projector=[64,64,32]"
CASES = {
    "presets": [f"{file.stem} {SMALL.get(file.stem, SHALLOW)}" for file in CONFIGS],
    "objectives": [f"{TINY} {keys}" for keys in (
        "loss.kind=l2", "loss.normalize=batch", "loss.normalize=none", "loss.target=pixels", "loss.target=input",
        "loss.regularizer=vicreg", "loss.regularizer=sigreg", "loss.regularizer=vicreg runtime.micro_batch=4",
        "loss.regularizer=sigreg runtime.micro_batch=4", "meta.predictor=joint",
        "loss.target_layers=[1,2]", "loss.target_layers=[1,2] loss.layers=mean loss.normalize=batch runtime.micro_batch=4",
        "loss.normalize=running runtime.micro_batch=4", "loss.normalize=dyntanh", "loss.visible_weight=0.5",
        "loss.regularizer=visreg", "meta.predictor_context=0.5 meta.predictor_repeats=2",
        "data.use_color_distortion=true data.color_jitter_strength=1 data.use_gaussian_blur=true",
        "mask.num_enc_masks=2", "mask.truncate=none", "mask.truncate=batch_min", "data.channels=1",
        "meta.positions=rope meta.qk_norm=true", f"loss.regularizer=sigreg {PROJECTOR}",
        f"loss.regularizer=vicreg {PROJECTOR} runtime.micro_batch=4",
    )],
    "compute": [
        *(f"{TINY} {keys}" for keys in (
            "runtime.micro_batch=4", "runtime.micro_batch=4 mask.num_enc_masks=2 meta.predictor=joint",
            "runtime.checkpoint_activations=true", "runtime.dtype=fp32", "runtime.attention=varlen", "runtime.attention=sdpa",
            "runtime.attention=matmul", "runtime.attention=short", "runtime.deterministic=true", "runtime.kernels=torch",
            "optimization.pred_lr_scale=2", "optimization.optimizer=muon",
            f"optimization.optimizer=muon runtime.micro_batch=4 loss.regularizer=vicreg {PROJECTOR}",
            f"runtime.zero=3 loss.regularizer=vicreg {PROJECTOR}",
        )),
        f"vit_base16 {SHALLOW} runtime.target_fp8=true",
        f"{TINY} runtime.zero=1", f"{TINY} runtime.zero=2 runtime.micro_batch=4", f"{TINY} runtime.zero=3",
    ],
    "graphs": [
        *(f"{TINY} runtime.cuda_graph=true mask.truncate_group=8 {keys}" for keys in (
            "", "runtime.micro_batch=4", "meta.predictor=joint", "runtime.attention=short", "loss.target=pixels",
            "runtime.checkpoint_activations=true", "meta.positions=rope meta.qk_norm=true", "optimization.optimizer=muon",
        )),
        f"vit_base16 {SHALLOW} runtime.cuda_graph=true mask.truncate_group=8 runtime.target_fp8=true",
    ],
    "compiled": [f"{TINY} runtime.compile=true {keys}" for keys in (
        "", "runtime.micro_batch=4 runtime.checkpoint_activations=true", "runtime.attention=short meta.predictor=joint",
        "mask.truncate=none mask.num_enc_masks=2 loss.target=input", "meta.positions=rope meta.qk_norm=true",
        f"loss.regularizer=sigreg {PROJECTOR}",
    )],
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_steps_do_not_wait_for_the_card(kind):
    assert lasting_faults_of("steps", "cuda:0", *CASES[kind]) == {}


def test_steps_with_a_teacher_of_other_patches_do_not_wait_either(tmp_path):
    """Eagerly, in a CUDA graph and compiled, where the average is not run and the teacher is the second graph."""
    teacher = f"{TINY} meta.teacher={write_teacher(tmp_path / 'teacher', 14, grid=(16, 16), num_heads=2)}"
    graph = "runtime.cuda_graph=true mask.truncate_group=8"
    keys = (
        "",
        "loss.target_layers=[1,3] runtime.micro_batch=4",
        "loss.target=input",
        graph,
        "runtime.compile=true",
        "runtime.zero=1",
    )
    assert lasting_faults_of("steps", "cuda:0", *(f"{teacher} {more}" for more in keys)) == {}


def test_steps_run_on_a_second_card():
    assert lasting_faults_of("steps", "cuda:1", TINY, f"{TINY} runtime.micro_batch=4 loss.regularizer=vicreg") == {}
