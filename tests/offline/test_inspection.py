import json
import shutil

import pytest
from checkpoints import THROUGH_TRANSFORMERS, save_tiny
from safetensors.torch import load_file, save_file

from onlinespec.drafters.checkpoints import SIDE_FILE
from onlinespec.drafters.loading import load_drafter
from onlinespec.drafters.settings import Tuning
from onlinespec.models.loading import load_target
from onlinespec.offline.inspection import describe, folders_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, and a drafter of each kind for it."""
    root = tmp_path_factory.mktemp("inspected")
    target = load_target(save_tiny(root / "target"))
    for name in ("eagle", "ngram"):
        load_drafter(name, target).save(root / name)
    return root


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda name: shutil.copytree(folders / name, tmp_path / name)


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def number_of_parameters(folder):
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_a_target_is_told_with_its_shape_and_fingerprint(folders):
    facts = describe(folders / "target")
    assert facts["kind"] == "target"
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["hidden_size"], facts["vocab_size"], facts["num_hidden_layers"]) == (64, 288, 2)
    assert facts["fingerprint"] == load_target(folders / "target").fingerprint
    assert facts["parameters"] == f"{number_of_parameters(folders / 'target'):,}"
    assert facts["runs through"] == "own"
    assert facts["stored as"] == "F32"
    assert "history" not in facts


@pytest.mark.parametrize("family", THROUGH_TRANSFORMERS)
def test_a_target_of_another_family_is_told_with_what_runs_it(tmp_path, family):
    facts = describe(save_tiny(tmp_path, family))
    assert facts["kind"] == "target"
    assert facts["architecture"] == THROUGH_TRANSFORMERS[family][1].__name__
    assert facts["runs through"] == "transformers"


def test_a_known_family_with_what_our_decoder_lacks_runs_through_transformers(copy_of):
    folder = copy_of("target")
    set_config(folder, hidden_act="gelu")
    assert describe(folder)["runs through"] == "transformers"


def test_a_target_that_nothing_runs_is_told_with_the_reason(copy_of):
    folder = copy_of("target")
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized (gptq)" in describe(folder)["runs through"]


def test_a_head_that_calls_itself_by_another_familys_architecture_is_a_drafter(copy_of):
    folder = copy_of("eagle")
    set_config(folder, architectures=["MixtralForCausalLM"], model_type="mixtral")
    assert describe(folder)["kind"] == "drafter (eagle)"


def test_shards_are_counted_together(tmp_path):
    facts = describe(save_tiny(tmp_path, max_shard_size="200KB"))
    whole = describe(save_tiny(tmp_path / "whole"))
    assert facts["parameters"] == whole["parameters"]
    assert not facts["size"].endswith(" 1 file")


def test_a_drafter_is_told_with_its_version_and_whom_it_fits(folders):
    facts = describe(folders / "eagle")
    assert facts["kind"] == "drafter (eagle)"
    assert facts["weights version"] == 0
    assert facts["target fingerprint"] == load_target(folders / "target").fingerprint
    assert facts["parameters"] == f"{number_of_parameters(folders / 'eagle'):,}"


def test_a_language_model_that_we_wrote_is_a_drafter_and_one_that_we_did_not_a_target(folders, tmp_path):
    target = load_target(folders / "target")
    drafter = load_drafter(folders / "target", target)
    drafter.notes = {"distilled_on": "some text"}
    drafter.save(tmp_path / "small_lm")
    facts = describe(tmp_path / "small_lm")
    assert facts["kind"] == "drafter (small_lm)"
    assert facts["distilled on"] == "some text"
    assert facts["target fingerprint"] == target.fingerprint


def test_adapters_are_told_with_the_model_underneath(folders, tmp_path):
    drafter = load_drafter(folders / "target", load_target(folders / "target"), tuning=Tuning("adapters", rank=3))
    drafter.save(tmp_path / "adapters")
    facts = describe(tmp_path / "adapters")
    assert facts["kind"] == "drafter (adapters of a small_lm)"
    assert facts["of"] == str(folders / "target")
    assert (facts["r"], facts["weights version"]) == (3, 0)
    assert facts["parameters"] == f"{sum(p.numel() for p in drafter.weights.params.values()):,}"


def test_a_drafter_without_weights_is_told(folders):
    facts = describe(folders / "ngram")
    assert facts["kind"] == "drafter (ngram)"
    assert facts["max_ngram"] == 3
    assert "parameters" not in facts


def test_a_drafter_of_another_program_has_no_history(copy_of):
    folder = copy_of("eagle")
    (folder / SIDE_FILE).unlink()
    assert "written by another program" in describe(folder)["history"]


def test_a_head_that_calls_itself_by_its_targets_architecture_is_a_drafter(copy_of):
    folder = copy_of("eagle")
    set_config(folder, architectures=["LlamaForCausalLM"])
    assert describe(folder)["kind"] == "drafter (eagle)"


def test_a_drafter_we_do_not_run_is_named(copy_of):
    folder = copy_of("eagle")
    set_config(folder, architectures=["LlamaForCausalLMEagle3"])
    with pytest.raises(ValueError, match="EAGLE-3"):
        describe(folder)


@pytest.mark.parametrize("name", ["target", "eagle"])
def test_weights_cut_short_are_named(copy_of, name):
    path = copy_of(name) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read .* cut short"):
        describe(path.parent)


def test_tensors_of_neither_are_shown(tmp_path, copy_of):
    folder = copy_of("eagle")
    save_file({"strange.weight": load_file(folder / "model.safetensors")["fc.weight"]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no drafter we know.*strange\.weight"):
        describe(folder)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, FileNotFoundError, "no directory"),
        (lambda path: path.write_text("{}"), ValueError, "is a file"),
        (lambda path: path.mkdir(), FileNotFoundError, r"config\.json is missing"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), ValueError, "not valid JSON"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("[]")), ValueError, "holds a list"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), FileNotFoundError, "neither model"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, make, error, words):
    make(tmp_path / "it")
    with pytest.raises(error, match=words):
        describe(*folders_of(str(tmp_path / "it")))


def test_demo_is_the_shipped_pair_the_target_first():
    target, drafter = (describe(folder) for folder in folders_of("demo"))
    assert target["kind"] == "target"
    assert drafter["kind"] == "drafter (eagle)"
    assert drafter["target fingerprint"] == target["fingerprint"]


@pytest.mark.parametrize("names", ["LlamaForCausalLM", [3], {"a": 1}], ids=str)
def test_architectures_that_are_no_list_of_names_are_refused(copy_of, names):
    folder = copy_of("target")
    set_config(folder, architectures=names)
    with pytest.raises(ValueError, match=r"config\.json: architectures is .* list of names"):
        describe(folder)
