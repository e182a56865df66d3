import json

import pytest
import torch
from rigs import random_target
from safetensors.torch import load_file, save_file

from onlinespec.drafters.checkpoints import read_format, read_side, write_drafter
from onlinespec.drafters.loading import load_drafter
from onlinespec.registry import DRAFTERS

TARGET = random_target()


def folder_with(folder, config, tensors=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, folder / "model.safetensors")
    return folder


OTHER_FAMILIES = [
    ({"architectures": ["LlamaForCausalLMEagle3"]}, "EAGLE-3"),
    ({"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}, "EAGLE-3"),
    ({"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 32000}, "EAGLE-3"),
    ({"architectures": ["DFlashDraftModel"], "block_size": 16}, "DFlash"),
    ({"architectures": ["DFlashSpeculator"]}, "DFlash"),
    ({"medusa_num_heads": 4, "medusa_num_layers": 1}, "Medusa"),
    ({"hydra_num_heads": 4, "hydra_head_arch": "prefix-mlp"}, "Hydra"),
]


@pytest.mark.parametrize(("config", "family"), OTHER_FAMILIES)
def test_a_drafter_of_another_family_is_refused_by_the_familys_name(tmp_path, config, family):
    folder = folder_with(tmp_path / "theirs", config, {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=f"family {family}"):
        load_drafter(folder, TARGET)


@pytest.mark.parametrize("architectures", [["EagleLlamaForCausalLM"], ["EAGLE"], ["LlamaForCausalLM"], None])
def test_an_eagle_file_is_known_by_its_tensors_whatever_its_config_calls_it(tmp_path, architectures):
    load_drafter("eagle", TARGET).save(tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text()) | {"architectures": architectures}
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(config))
    assert read_format(tmp_path / "drafter") == "eagle"


def test_a_whole_model_is_no_drafter_we_know(tmp_path):
    tensors = {n: torch.zeros(1) for n in ("lm_head.weight", "fc.weight", "layers.0.self_attn.q_proj.weight")}
    with pytest.raises(ValueError, match="no drafter we know: architecture LlamaForCausalLM"):
        read_format(folder_with(tmp_path / "model", {"architectures": ["LlamaForCausalLM"]}, tensors))


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config"):
        load_drafter(tmp_path, TARGET)


def test_a_config_that_is_no_json_is_refused_by_its_path(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config"):
        load_drafter(tmp_path, TARGET)


def test_architectures_that_are_no_list_are_refused_by_the_file(tmp_path):
    folder = folder_with(tmp_path / "drafter", {"architectures": "NgramDrafter"})
    with pytest.raises(ValueError, match=r"config\.json: architectures is 'NgramDrafter'; it must be a list"):
        load_drafter(folder, TARGET)


def test_a_mistyped_name_is_answered_with_the_drafters_there_are(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        load_drafter(str(tmp_path / "eagel"), TARGET)
    assert all(name in str(raised.value) for name in DRAFTERS)


def test_a_drafter_of_another_package_is_found_by_its_path():
    drafter = load_drafter("onlinespec.drafters.ngram:Ngram", TARGET)
    assert type(drafter).__name__ == "Ngram"


def test_ours_stands_apart_from_the_published_files(tmp_path):
    side = {"target_fingerprint": "abc"}
    write_drafter(tmp_path / "drafter", {"theirs": 1}, {"t": torch.ones(2)}, version=3, side=side)
    assert json.loads((tmp_path / "drafter" / "config.json").read_text()) == {"theirs": 1}
    assert read_side(tmp_path / "drafter") == {"weights_version": 3, "target_fingerprint": "abc"}
    assert set(load_file(tmp_path / "drafter" / "model.safetensors")) == {"t"}


def test_a_drafter_from_elsewhere_has_no_side_file(tmp_path):
    assert read_side(tmp_path) == {}


def test_parents_of_the_directory_are_made(tmp_path):
    write_drafter(tmp_path / "a" / "b", {}, {}, version=0)
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "drafter").mkdir()
    write_drafter(tmp_path / "drafter", {}, {}, version=0)
    assert (tmp_path / "drafter" / "config.json").is_file()


def test_tensors_that_share_memory_or_learn_are_saved_whole(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    learning = torch.ones(2, requires_grad=True)
    write_drafter(tmp_path / "drafter", {}, {"t": base.T, "row": base[1], "w": learning}, version=0)
    saved = load_file(tmp_path / "drafter" / "model.safetensors")
    assert torch.equal(saved["t"], base.T)
    assert torch.equal(saved["row"], base[1])
    assert torch.equal(saved["w"], learning.detach())


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_place_that_cannot_be_written_is_refused_by_its_path(tmp_path, place):
    (tmp_path / "taken").write_text("mine")
    folder = tmp_path / "taken" if place == "a file" else tmp_path / "taken" / "drafter"
    with pytest.raises(ValueError, match="taken"):
        write_drafter(folder, {}, {}, version=0)
    assert (tmp_path / "taken").read_text() == "mine"
