"""Device maps against accelerate's own checks, and the module names of every family against the real models."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import check_device_map
from families import make_batch, make_config, make_model
from shrunk import SMALL, TRANSLATORS, build, small_config
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lp_plugin import Cluster, ModelProfile, PartitionFormatError, Plan, Workload
from lp_plugin.integrations.formats import export_partition, import_partition
from lp_plugin.integrations.module_names import module_names, units_of
from lp_plugin.solver.solve import evaluate

BLOCKS = 4
CUTS = ((0, 3, 7), (0, 1, 5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7), (0, 6, 7))
FAMILIES = ("llama", "llama-tied", "gemma2", "mixtral", "gpt_neox", "gpt2", "falcon", "bloom")
"""One or two for each set of module names; modules that only some models have, as opt's, are tested with `SMALL`."""
ONE_RUN = [config for config in SMALL if config["model_type"] not in TRANSLATORS]
"""Small configs of all families but the encoder-decoders, which only DeepSpeed's numbers can express."""


def planned(config: PretrainedConfig, boundaries: tuple[int, ...]) -> Plan:
    profile = ModelProfile.from_config(config.to_dict(), dtype="float32")
    cluster = Cluster.homogeneous("h200", len(boundaries) - 1)
    return evaluate(profile, cluster, Workload(batch=1, sequence=4, micro_batch=1), boundaries)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check(model: PreTrainedModel, device_map: dict[str, int]) -> None:
    """accelerate's own check; it warns about names that the model does not have, and warnings are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_device_map(model, device_map)


@pytest.mark.parametrize("config", ONE_RUN, ids=lambda config: config["model_type"])
def test_module_names_hold_the_parameters_that_are_counted(config: dict[str, Any]) -> None:
    model, profile = build(config), ModelProfile.from_config(config)
    names = module_names(config["model_type"])
    modules = dict(model.named_modules())
    units = units_of(profile.layers, config["model_type"])
    written = [name for unit in units for name in unit.modules]
    assert {name for name in written if name not in modules} <= set(names.optional)
    found = [name for name in [*written, *names.weightless] if name in modules]
    check(model, dict.fromkeys(found, 0))
    for unit in units:
        parts = [modules[name] for name in unit.modules if name in modules]
        held = {id(parameter): parameter.numel() for part in parts for parameter in part.parameters()}
        assert sum(held.values()) == sum(layer.parameters for layer in profile.layers[unit.start : unit.stop])
    for name in names.weightless:
        assert name not in modules or not list(modules[name].parameters())


@pytest.mark.parametrize("family", TRANSLATORS)
def test_an_encoder_and_a_decoder_are_more_than_one_run(family: str) -> None:
    profile = ModelProfile.from_config(small_config(family))
    with pytest.raises(PartitionFormatError, match=r"accelerate: .* the blocks are not one run \(an encoder and a dec"):
        import_partition('{"": 0}', profile.layers, "accelerate", model_type=family)
    assert import_partition("[0, 3, 6]", profile.layers[:6], "deepspeed") == (0, 3, 6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boundaries", CUTS)
def test_each_device_gets_the_bytes_that_were_planned(family: str, boundaries: tuple[int, ...]) -> None:
    config = make_config(family, BLOCKS)
    model, plan = on_meta(config), planned(config, boundaries)
    text = export_partition(plan, "accelerate")
    device_map = json.loads(text)
    check(model, device_map)
    held: list[dict[int, torch.Tensor]] = [{} for _ in plan.stages]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        device = next(device for module, device in device_map.items() if name.startswith(f"{module}."))
        held[device][id(parameter)] = parameter
    sizes = [sum(each.numel() * 4 for each in parameters.values()) for parameters in held]
    assert sizes == [stage.weight_bytes for stage in plan.stages]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt_neox"])
def test_a_dispatched_model_computes_the_same(family: str) -> None:
    """One device stands for all here: what is tested is that accelerate takes the map and hooks every module."""
    model = make_model(make_config(family, BLOCKS))
    ids, _ = make_batch("none", 1)
    with torch.no_grad():
        expected = model(ids).logits
        device_map = json.loads(export_partition(planned(model.config, (0, 1, 4, 6, 7)), "accelerate"))
        dispatched = dispatch_model(model, dict.fromkeys(device_map, "cpu"), force_hooks=True)
        assert torch.equal(dispatched(ids).logits, expected)
    hooked = {name for name, module in dispatched.named_modules() if hasattr(module, "_hf_hook")}
    assert device_map.keys() <= hooked


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [60, 150, 300])
def test_accelerates_own_maps_are_read(family: str, first: int) -> None:
    """Unless a tied head comes back to the embedding's device, which no pipeline can express."""
    config = make_config(family, BLOCKS)
    model = on_meta(config)
    limits = {0: f"{first}KB", 1: "150KB", 2: "1GB"}
    device_map = dict(infer_auto_device_map(model, limits, no_split_module_classes=list(model._no_split_modules)))

    def place(name: str) -> Any:
        return next(device for module, device in device_map.items() if f"{name}.".startswith(f"{module}."))

    profile = ModelProfile.from_config(config.to_dict())
    units = units_of(profile.layers, config.model_type)
    places = [place(unit.modules[0]) for unit in units]
    runs = [(device, len(list(run))) for device, run in itertools.groupby(places)]
    text = json.dumps(device_map)
    if len({device for device, _ in runs}) < len(runs):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        with pytest.raises(PartitionFormatError, match=r"'lm_head' is in place . again"):
            import_partition(text, profile.layers, "accelerate", model_type=config.model_type)
        return
    boundaries = import_partition(text, profile.layers, "accelerate", model_type=config.model_type)
    assert boundaries == tuple(itertools.accumulate((length for _, length in runs), initial=0))
