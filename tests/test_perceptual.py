"Shift-tolerant LPIPS: our network against the package's own, its gradient, and what is said without the weights."
import sys
from types import ModuleType

import pytest
import torch

from dreamer4_nb.core import UserError, step_generator
from dreamer4_nb.method import perceptual
from dreamer4_nb.method.perceptual import ShiftTolerantLPIPS
from dreamer4_nb.method.tokenizer import PerceptualLoss
from dreamer4_nb.runs.cli import main, parse

pytest.importorskip("stlpips_pytorch")


def pairs(side, n=3):
    g = step_generator(0)
    x = torch.rand(n, 3, side, side, generator=g)
    return x, (x + 0.1 * torch.randn(x.shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("side", [64, 48, 33])
def test_the_numbers_are_those_of_the_package(side, monkeypatch):
    unused = ModuleType("torchsummary")                    # the package wants it and does not use it
    unused.summary = None
    monkeypatch.setitem(sys.modules, "torchsummary", unused)
    from stlpips_pytorch import stlpips
    theirs = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    x, y = pairs(side)
    with torch.no_grad():
        expected = theirs(x, y, normalize=True).flatten()
        assert torch.allclose(ShiftTolerantLPIPS()(x, y), expected, rtol=1e-5, atol=1e-9) and expected.min() > 0
        assert PerceptualLoss("stlpips")(x, y).item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    distance = ShiftTolerantLPIPS().double()
    x, y = (pictures.double() for pictures in pairs(32, 1))
    x.requires_grad_()
    distance(x, y).sum().backward()
    way = torch.randn(x.shape, generator=step_generator(1), dtype=torch.float64)
    up, down = (distance(x.detach() + sign * 1e-8 * way, y).sum() for sign in (1, -1))
    assert ((up - down) / 2e-8).item() == pytest.approx((x.grad * way).sum().item(), rel=1e-4)
    assert not any(weight.requires_grad for weight in distance.parameters())


def test_black_images_have_a_finite_gradient():
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    ShiftTolerantLPIPS()(x, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert x.grad.isfinite().all()


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    perceptual.stlpips_weights.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(perceptual, "stlpips_path", lambda: None)
        with pytest.raises(UserError, match=r"pip install 'dreamer4_nb\[perceptual\]'"):
            PerceptualLoss("stlpips")
        command = f"demo --preset micro --tokenizer.distance stlpips --tokenizer.perceptual 0.2 --run {tmp_path / 'run'}"
        assert main(command.split()) == 2 and "stlpips_pytorch" in capsys.readouterr().err     # before the first step
        assert not (tmp_path / "run" / "tokenizer.draft.log.jsonl").exists()
        broken = tmp_path / "weights.pth"
        broken.write_bytes(b"no weights")
        patch.setattr(perceptual, "stlpips_path", lambda: broken)
        with pytest.raises(UserError, match="is damaged"):
            PerceptualLoss("stlpips")
    with pytest.raises(UserError, match="choose 'auto', 'lpips', 'stlpips' or 'gradient'"):
        PerceptualLoss("vgg")
    with pytest.raises(UserError, match="images has shape"):
        ShiftTolerantLPIPS()(*(x[:, :1] for x in pairs(32)))


def test_the_setting_reaches_the_training(monkeypatch, tmp_path):
    from dreamer4_nb.training import phases
    kinds = []
    monkeypatch.setattr(phases, "PerceptualLoss", lambda kind: kinds.append(kind) or PerceptualLoss(kind))
    command = parse("demo --preset micro --tokenizer.distance stlpips --tokenizer.perceptual 0.2".split())
    assert command.settings.tokenizer.distance == "stlpips"
    assert main(f"train tokenizer --preset micro --tokenizer.distance stlpips --tokenizer.perceptual 0.2 "
                f"--tokenizer.slow-steps 0 --tokenizer.train.steps 1 --run {tmp_path / 'run'}".split()) == 0
    assert kinds == ["stlpips"]
