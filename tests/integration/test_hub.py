"""Models and checkpoints by their id on the Hub: from the cache alone, and from a Hub on this machine."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import torch
from transformers import AutoModelForCausalLM

import globe_kernels
from globe_fit import ExpertSource, FitConfig, VarProConfig, compress
from globe_fit.data.model import load_model
from globe_kernels import GlobeCheckpoint
from globe_kernels.errors import GlobeError, RequestError
from globe_kernels.format import hub as product
from globe_kernels.format.hub import at_revision, is_hub_id, local_directory, model_name
from globe_kernels.testing import assert_close, tiny_model
from tests.fake_hub import FakeHub, cached, serving
from tests.integration.conftest import QUICK, assert_refused
from tests.integration.test_patching import logits

CONFIG = FitConfig(ratio=0.8, support=4, device="cpu", varpro=VarProConfig(steps=3))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of huggingface_hub, which reads these constants from the environment when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch):
    """A Hub that answers."""
    served = FakeHub()
    with serving(served) as address:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.chdir(cache.parent)
        yield served


@pytest.fixture
def repository(save_tiny, tmp_path) -> Path:
    """A model with files that nobody needs."""
    path = Path(shutil.copytree(save_tiny("qwen3_moe"), tmp_path / "repository"))
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"weights in another format")
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text("x = 1\n")
    return path


def test_a_model_is_downloaded_once_and_without_other_formats(hub, repository, cache):
    hub.models["Org/My-MoE"] = repository
    said: list[str] = []
    found = local_directory("Org/My-MoE", say=said.append)
    assert found == cache / "models--Org--My-MoE" / "snapshots" / hub.commit("Org/My-MoE")
    index = json.loads((repository / "model.safetensors.index.json").read_text())
    assert {path.name for path in found.glob("*.safetensors")} == set(index["weight_map"].values())
    others = {"pytorch_model.bin", "consolidated.safetensors", "original", "onnx"}
    assert not others & {each.name for each in found.iterdir()}
    assert (found / "custom_generate" / "generate.py").is_file()
    assert len(said) == 1 and "of Org/My-MoE come from the Hub into" in said[0]
    count = len(hub.served)
    assert local_directory("Org/My-MoE", say=said.append) == found
    assert (len(hub.served), len(said)) == (count, 1)
    assert ExpertSource("Org/My-MoE").base.name == "Org/My-MoE"


def test_a_plan_downloads_the_configuration_alone(hub, repository, globe):
    hub.models["Org/My-MoE"] = repository
    code, stdout, stderr = globe("plan", "Org/My-MoE", "--support", "4", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["model"] == "Org/My-MoE" and hub.served == ["config.json"]


def test_fit_export_and_load_by_ids(hub, repository, globe, tmp_path):
    hub.models["Org/My-MoE"] = repository
    code, _, stderr = globe("fit", "--no-calibrate", "Org/My-MoE", "-o", "globe", *QUICK)
    assert code == 0, stderr
    hub.models["Me/globe"] = tmp_path / "globe"
    assert globe("inspect", "Me/globe")[0] == 0
    code, _, stderr = globe("export", "Me/globe", "--base", "Org/My-MoE", "-o", "hf")
    assert code == 0, stderr
    assert "base_model: Org/My-MoE" in (tmp_path / "hf" / "README.md").read_text()
    hub.models["Me/export"] = tmp_path / "hf"
    loaded = AutoModelForCausalLM.from_pretrained("Me/export", dtype=torch.float32).eval()
    patched = tiny_model("qwen3_moe")
    globe_kernels.patch(patched, "Me/globe")
    assert_close(logits(loaded), logits(patched), rms=1e-6, peak=1e-5)
    assert_close(logits(load_model("Me/export", dtype=torch.float32)), logits(patched), rms=1e-6, peak=1e-5)
    refused = globe("report", "Me/globe")
    assert_refused(refused, 2, "Me/globe comes from the Hub, whose cache takes no page; give a file with -o")
    assert not (GlobeCheckpoint("Me/globe").path / "report.html").exists()
    assert_refused(
        globe("fit", "--no-calibrate", "Me/export", "-o", "new", *QUICK), 2, "is a model that GloBE compressed already"
    )


def test_a_checkpoint_beside_its_model(hub, repository, fit_tiny):
    for path in fit_tiny()[0].iterdir():
        if path.name != "config.json":
            shutil.copy(path, repository)
    hub.models["Org/both"] = repository
    model = AutoModelForCausalLM.from_pretrained("Org/both")
    assert len(globe_kernels.patch(model).replaced) == 3
    assert len(ExpertSource("Org/both").layers) == 3 and GlobeCheckpoint("Org/both", verify=True)
    hub.models["Org/alone"] = Path(shutil.copytree(repository, repository.with_name("alone")))
    (hub.models["Org/alone"] / "globe_config.json").unlink()
    with pytest.raises(
        RequestError, match=r"directory \(Org/alone\) holds no globe_config.json; pass the GloBE checkpoint"
    ):
        globe_kernels.patch(AutoModelForCausalLM.from_pretrained("Org/alone"))


def test_a_revision(hub, repository, globe):
    hub.models["Org/My-MoE"], hub.branches["Org/My-MoE"] = repository, {"v2"}
    assert globe("plan", "Org/My-MoE", "--revision", "v2", "--support", "4")[0] == 0
    assert local_directory("Org/My-MoE@v2", weights=False).name == hub.commit("Org/My-MoE")
    sentence = "Org/My-MoE has no revision 'v3' on the Hugging Face Hub; give a branch"
    assert_refused(globe("fit", "--no-calibrate", "Org/My-MoE", "--revision", "v3", "-o", "new", *QUICK), 2, sentence)
    refused = globe("fit", "--no-calibrate", repository, "--revision", "v2", "-o", "new", *QUICK)
    assert_refused(refused, 2, "--revision v2 names a version of a model on the Hugging Face Hub and")


def test_the_weights_are_of_the_commit_of_the_configuration(hub, repository, monkeypatch):
    """The branch moves between the two."""
    hub.models["Org/My-MoE"] = repository
    first, weights = hub.commit("Org/My-MoE"), product._Download.get_weights

    def later(self, names, *rest, **named):
        assert self._revision == first
        weights(self, names, *rest, **named)

    monkeypatch.setattr(product._Download, "get_weights", later)
    assert local_directory("Org/My-MoE").name == first


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "RepoNotFound", "is no directory here, and the Hugging Face Hub has no model of this name"),
        (401, "RepoNotFound", "log in with `hf auth login` if the model is private"),
        (403, "GatedRepo", "is gated: accept its terms on http"),
        (500, "", "is not, or not whole, in the cache"),
    ],
)
def test_a_model_that_the_hub_refuses(hub, globe, status, code, sentence):
    hub.refused["Org/secret"] = (status, code)
    for command in (("plan",), ("fit", "--no-calibrate", "-o", "new", *QUICK), ("inspect",), ("sweep", "-o", "new")):
        assert_refused(globe(command[0], "Org/secret", *command[1:]), 2, sentence)
    with pytest.raises(RequestError, match="Org/secret"):
        globe_kernels.patch(tiny_model("qwen3_moe"), "Org/secret")


def test_a_disk_without_room_is_known_before_the_download(hub, repository):
    hub.models["Org/My-MoE"] = repository
    shard = next(repository.glob("model-*.safetensors")).name
    hub.sizes[shard] = 10**15
    with pytest.raises(
        GlobeError, match="The weights of Org/My-MoE take 1.00 PB and .* are free in .*; free some space"
    ):
        local_directory("Org/My-MoE")
    assert shard not in hub.served


def test_a_hub_that_says_no_sizes(hub, repository):
    hub.models["Org/name"] = repository
    hub.sizes |= {path.name: None for path in repository.glob("*.safetensors")}
    assert ExpertSource("Org/name").layers


def test_a_repository_of_pickles(hub, repository, globe):
    for path in repository.glob("*.safetensors*"):
        path.unlink()
    (repository / "pytorch_model.bin.index.json").write_text("{}")
    hub.models["Org/old"] = repository
    assert_refused(
        globe("fit", "--no-calibrate", "Org/old", "-o", "new", *QUICK),
        2,
        "in a format of pickled files; load the model with",
    )


def test_a_download_that_breaks(hub, repository, monkeypatch):
    hub.models["Org/My-MoE"] = repository

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(GlobeError, match="Downloading Org/My-MoE failed .*No space left.*; mend the cause and run"):
        local_directory("Org/My-MoE")


def test_the_cache_without_a_network(cache, repository, globe, tmp_path, monkeypatch):
    """HF_HUB_OFFLINE is set in all tests. The cache was filled by a program that keeps no listing."""
    monkeypatch.chdir(tmp_path)
    snapshot = cached(repository, cache, "Org/My-MoE")
    assert local_directory("Org/My-MoE") == snapshot
    result = compress("Org/My-MoE", tmp_path / "globe", CONFIG, calibrate=None)
    assert result.config.base.name == "Org/My-MoE"
    code, _, stderr = globe("export", "globe", "--base", "Org/My-MoE", "-o", "hf")
    assert code == 0, stderr
    cached(tmp_path / "globe", cache, "Me/globe")
    globe_kernels.patch(tiny_model("qwen3_moe"), "Me/globe")
    cached(tmp_path / "hf", cache, "Me/export")
    loaded = AutoModelForCausalLM.from_pretrained("Me/export", dtype=torch.float32)
    assert not any("gate_up" in name for name, _ in loaded.named_parameters())
    missing = "Org/another is no directory here, and a model of the Hugging Face Hub of this name is not, or not whole"
    assert_refused(globe("fit", "--no-calibrate", "Org/another", "-o", "new", *QUICK), 2, missing)
    sentence = globe("fit", "--no-calibrate", "Org/another", "-o", "new", *QUICK)[2]
    assert "while HF_HUB_OFFLINE is set; check the spelling of the path" in sentence
    assert_refused(
        globe("fit", "--no-calibrate", "Org/My-MoE@v9", "-o", "new", *QUICK), 2, "Org/My-MoE at v9 is no directory here"
    )


@pytest.mark.parametrize("left", ["config.json", "all but a shard"])
def test_a_part_of_a_model_in_the_cache_without_a_network(cache, repository, globe, tmp_path, monkeypatch, left):
    monkeypatch.chdir(tmp_path)
    snapshot = cached(repository, cache, "Org/My-MoE")
    shards = sorted(snapshot.glob("model-*.safetensors"))
    for path in [*shards, snapshot / "model.safetensors.index.json"] if left == "config.json" else shards[2:3]:
        path.unlink()
    assert globe("plan", "Org/My-MoE", "--support", "4")[0] == 0
    assert_refused(
        globe("fit", "--no-calibrate", "Org/My-MoE", "-o", "new", *QUICK), 2, "is not, or not whole, in the cache"
    )


def snapshot_itself(snapshot: Path, tmp_path: Path) -> Path:
    return snapshot


def a_link_to_the_snapshot(snapshot: Path, tmp_path: Path) -> Path:
    (tmp_path / "shortcut").symlink_to(snapshot)
    return tmp_path / "shortcut"


def a_cache_behind_a_link(snapshot: Path, tmp_path: Path) -> Path:
    (tmp_path / "other-disk").symlink_to(snapshot.parents[2])
    return tmp_path / "other-disk" / snapshot.parents[1].name / "snapshots" / snapshot.name


def a_relative_path(snapshot: Path, tmp_path: Path) -> Path:
    return Path(os.path.relpath(snapshot))


@pytest.mark.parametrize("given", [snapshot_itself, a_link_to_the_snapshot, a_cache_behind_a_link, a_relative_path])
def test_a_snapshot_is_named_by_its_id(save_tiny, tmp_path, given):
    snapshot = cached(save_tiny("qwen3_moe"), tmp_path / "hub", "Org/My--MoE")
    source = ExpertSource(given(snapshot, tmp_path))
    assert source.base.name == "Org/My--MoE"
    assert torch.equal(source.read(source.layers[0], "up"), tiny_up())


def tiny_up() -> torch.Tensor:
    return tiny_model("qwen3_moe").model.layers[0].mlp.experts.gate_up_proj.detach().chunk(2, dim=1)[1]


def test_other_directories_are_named_by_their_name(save_tiny, tmp_path):
    """As `hf download --local-dir` leaves them, with its notes in .cache, and as a copy in a folder named snapshots."""
    for folder in ("My-MoE", "snapshots/My-MoE"):
        path = Path(shutil.copytree(save_tiny("qwen3_moe"), tmp_path / folder))
        (path / ".cache" / "huggingface" / "download").mkdir(parents=True)
        (path / ".cache" / "huggingface" / "download" / "config.json.metadata").write_text("commit\netag\n0\n")
        assert ExpertSource(path).base.name == model_name(path) == "My-MoE"


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("Qwen/Qwen3-30B-A3B", True),
        ("Qwen/Qwen3-30B-A3B@main", True),
        ("Qwen/Qwen3-30B-A3B@refs/pr/3", True),
        ("./out/globe", False),
        ("../out/globe", False),
        ("/out/globe", False),
        ("~/out", False),
        ("out/globe/gate", False),
        ("globe", False),
        ("https://huggingface.co/Org/name", False),
        ("here/model", False),
    ],
)
def test_ids_and_paths(tmp_path, monkeypatch, text, is_id):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(text) == is_id
    if is_id and "@" not in text:
        assert at_revision(text, "v1") == f"{text}@v1" and at_revision(text, None) == text
    else:
        with pytest.raises(RequestError, match="--revision v1 names a version"):
            at_revision(text, "v1")


def test_a_path_that_is_not_there_says_both(globe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(
        globe("fit", "--no-calibrate", "modle", "-o", "new", *QUICK),
        2,
        "give the local directory of a Hugging Face model, or its id",
    )
    assert_refused(
        globe("inspect", "./out/globe"), 2, "out/globe does not exist; give the directory that `globe fit -o`"
    )
    assert_refused(
        globe("export", "out/globe", "--base", "b", "-o", "x"), 2, "out/globe is no directory here, and a model"
    )
