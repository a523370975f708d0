"""Published weights to safetensors: plain tensors need no trust, programs do, and run elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsereel.cli.main import run
from sparsereel_eval.convert import convert
from sparsereel_eval.features import make_extractor


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_plain_tensors_need_no_trust(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    torch.save({"state_dict": {f"net.{k}": v for k, v in layers.state_dict().items()}}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "new" / "a.safetensors", prefix="net.") == 4
    found = load_file(tmp_path / "new" / "a.safetensors")
    assert all(torch.equal(found[name], value) for name, value in layers.state_dict().items())
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.safetensors"]
    with pytest.raises(ValueError, match="no tensors under 'other"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", prefix="other.")


def test_programs_need_trust(tmp_path, capsys):
    mark = tmp_path / "mark"
    torch.save({"a": torch.ones(2), "evil": Evil(mark)}, tmp_path / "evil.pt")
    command = ["eval", "convert", str(tmp_path / "evil.pt"), str(tmp_path / "evil.safetensors")]
    assert run(command) == 2
    assert "say --trust" in " ".join(capsys.readouterr().err.split())
    assert not mark.exists()
    assert not (tmp_path / "evil.safetensors").exists()
    assert run([*command, "--trust"]) == 0
    assert mark.exists()
    assert load_file(tmp_path / "evil.safetensors")["a"].tolist() == [1, 1]


def test_torchscript(tmp_path):
    module = torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3))
    module.save(str(tmp_path / "s.pt"))
    with pytest.raises(ValueError, match="TorchScript program"):
        convert(tmp_path / "s.pt", tmp_path / "s.safetensors")
    assert convert(tmp_path / "s.pt", tmp_path / "s.safetensors", trust=True) == 2


def test_the_child_sees_nothing_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    module = torch.nn.Linear(1, 1)

    class Look:
        def __reduce__(self):
            return exec, (f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(' '.join(os.environ))",)

    torch.save({"a": module.weight.detach(), "look": Look()}, tmp_path / "l.pt")
    convert(tmp_path / "l.pt", tmp_path / "l.safetensors", trust=True)
    seen = (tmp_path / "seen").read_text().split()
    assert "SECRET_TOKEN" not in seen
    assert "PATH" in seen
    assert os.environ["SECRET_TOKEN"] == "x"


def test_what_is_no_weights_is_named(tmp_path):
    (tmp_path / "t.pt").write_text("no weights")
    (tmp_path / "e.pt").touch()
    torch.save(torch.ones(1), tmp_path / "one.pt")
    for name, text in (("t.pt", "t.pt"), ("e.pt", "0 bytes"), ("no.pt", "does not exist"), ("one.pt", "not named")):
        with pytest.raises(ValueError, match=text):
            convert(tmp_path / name, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"end in \.safetensors"):
        convert(tmp_path / "one.pt", tmp_path / "x.pt")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_converted_network_is_a_feature_extractor(tmp_path):
    from torchvision.models import resnet18

    torch.save(resnet18(weights=None).state_dict(), tmp_path / "r.pth")
    convert(tmp_path / "r.pth", tmp_path / "r.safetensors")
    extractor = make_extractor("torchvision:resnet18", "pictures", weights=tmp_path / "r.safetensors")
    assert extractor.function(torch.rand(1, 3, 32, 32)).shape == (1, 512)
