"""util/precision.py: what `auto` means on each device, and when a loss is scaled."""

import pytest
import torch

from util import distributed
from util.precision import autocast, check_precision, grad_scaler


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("has_bf16, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_a_gpu(monkeypatch, has_bf16, dtype):
    """bf16 where the GPU computes in it itself (V100 and T4 emulate it), else fp16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: has_bf16 or including_emulation)
    assert autocast("auto", torch.device("cuda")).fast_dtype == dtype


def test_auto_on_a_cpu_is_fp32():
    assert not autocast("auto", torch.device("cpu"))._enabled


@pytest.mark.parametrize("tf32", [False, True])
def test_a_script_says_what_fp32_is_on_a_gpu(tf32):
    """torch's defaults differ between matrices and convolutions; they come back afterwards."""
    def allowed():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    before = allowed()
    with distributed.session("x.py", tf32):
        assert allowed() == (tf32, tf32)
    assert allowed() == before and before[0] != before[1]


def test_only_fp16_scales_the_loss():
    cpu = torch.device("cpu")
    assert grad_scaler("auto", cpu).get_scale() == grad_scaler("bf16", cpu).get_scale() == 1
    assert grad_scaler("fp16", cpu).get_scale() > 1


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="PRECISION is 'int8'; it must be one of auto, bf16, fp16"):
        check_precision("int8")
