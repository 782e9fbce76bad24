import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from step3_vl import Step3TextConfig, Step3TextForCausalLM, Step3VisionEncoderConfig, Step3VLConfig


# As released, with the spellings and the extra keys of that time.
RELEASED = {
    "architectures": ["Step3VLForConditionalGeneration"],
    "model_type": "step3_vl",
    "im_end_token": "<im_end>",
    "image_token_len": 169,
    "image_token_id": 128001,
    "understand_projector_stride": 2,
    "projector_bias": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1792,
        "output_hidden_size": 4096,
        "image_size": 728,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_hidden_layers": 63,
        "patch_size": 14,
    },
    "text_config": {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        "hidden_size": 7168,
        "num_attention_groups": 1,
        "max_position_embedding": 65536,
        "moe_layers_enum": ",".join(str(i) for i in range(4, 60)),
        "rope_theta": 500000,
        "rope_scaling": None,
        "share_q_dim": 2048,
        "use_im_start_end": "true",
    },
}


def test_the_released_config_is_the_default_one():
    config = Step3VLConfig(**json.loads(json.dumps(RELEASED)))
    default = Step3VLConfig()
    assert config.text_config.moe_layers == list(range(4, 60))
    assert config.text_config.rope_parameters == {"rope_theta": 500000, "rope_type": "default"}
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(c, part).to_dict() for c in (default, config))
        assert all(value == theirs[name] for name, value in ours.items() if name != "dtype")
    saved = config.to_dict()  # also what is not known
    assert saved["im_end_token"] == "<im_end>" and saved["image_token_len"] == 169
    assert saved["text_config"]["use_im_start_end"] == "true"


@pytest.mark.defect(8)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"moe_layers_enum": "2"}, [2]),
        ({"moe_layers_enum": " 3,, 1 "}, [1, 3]),
        ({"moe_layers_enum": [0, 3]}, [0, 3]),
        ({"moe_layers_enum": (1,)}, [1]),
        *(({"moe_layers_enum": form}, [1, 2, 3]) for form in ("", None, [])),
        ({"num_hidden_layers": 1}, []),
        ({}, [1, 2, 3]),
        ({"num_hidden_layers": 61}, list(range(4, 60))),
        ({"moe_layers_enum": "1,2", "use_moe": False}, []),
    ],
)
def test_moe_layers(given, expected):
    config = Step3VLConfig(text_config={"num_hidden_layers": 4, "rope_theta": 1e4, **given})
    assert Step3VLConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config = config.text_config
    assert config.moe_layers == expected and config.rope_parameters["rope_theta"] == 1e4
    assert Step3TextConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert expected or config.to_dict()["moe_layers_enum"] == "-1"  # which serving engines read as none


def test_standard_names():
    config = Step3TextConfig(num_hidden_layers=2, num_experts=6, num_experts_per_tok=2, max_position_embeddings=77)
    assert (config.moe_num_experts, config.moe_top_k, config.max_position_embedding) == (6, 2, 77)
    assert config.num_key_value_heads == 1 and config.norm_topk_prob is False and config.num_local_experts == 6
    config.norm_topk_prob = True
    assert config.norm_expert_weight is True


def test_the_callers_dictionaries_are_left_alone():
    values = json.loads(json.dumps(RELEASED))
    values["text_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0}
    before = json.dumps(values)
    Step3VLConfig(**values)
    assert json.dumps(values) == before


@pytest.mark.parametrize(
    ("config_class", "changes", "message"),
    [
        *(
            (config_class, {name: value}, f"'{name}'.*\\n.*greater or equal to 1 .*, got {value}")
            for config_class, value in ((Step3TextConfig, 0), (Step3VisionEncoderConfig, -1))
            for name, field in config_class.__dataclass_fields__.items()
            if field.type is int
        ),
        (Step3TextConfig, {"attention_dropout": 1.5}, "'attention_dropout'.*\\n.*got 1.5"),
        (Step3VisionEncoderConfig, {"attention_dropout": -0.1}, "'attention_dropout'.*\\n.*got -0.1"),
        (Step3TextConfig, {"rms_norm_eps": float("nan")}, "'rms_norm_eps'.*\\n.*got nan"),
        (Step3TextConfig, {"router_aux_loss_coef": -1.0}, "'router_aux_loss_coef'.*\\n.*got -1.0"),
        (Step3TextConfig, {"hidden_size": "wide"}, "hidden_size.*wide"),
        (Step3TextConfig, {"head_dim": 7}, "even rotary dimension.*`head_dim`=7"),
        (Step3TextConfig, {"num_attention_heads": 6, "num_attention_groups": 4}, "must divide.*4 for 6"),
        (Step3TextConfig, {"moe_layers_enum": "4,x"}, "invalid literal .*'x'"),
        (Step3TextConfig, {"moe_layers_enum": 5}, "moe_layers_enum"),
        (Step3TextConfig, {"moe_layers_enum": [4, 61]}, "between 0 and 60, got '4,61'"),
        (Step3TextConfig, {"moe_layers_enum": "-1"}, "between 0 and 60, got '-1'"),
        (Step3VisionEncoderConfig, {"image_size": 720}, "patches of 14 px in 720 px"),
        (Step3VLConfig, {"image_token_id": 128815}, "between 0 and 128814, got 128815"),
        (Step3VLConfig, {"understand_projector_stride": 0}, "'understand_projector_stride'.*\\n.*got 0"),
    ],
)  # fmt: skip
def test_values_are_checked(config_class, changes, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        config_class(**changes)


@pytest.mark.defect(1)
def test_values_that_are_set_later_are_checked():
    config = Step3TextConfig()
    with pytest.raises(StrictDataclassError, match="'attention_dropout'.*\n.*got 1.5"):
        config.attention_dropout = 1.5
    config.moe_layers_enum = "61"  # of 61, which a model is not made of
    with torch.device("meta"), pytest.raises(StrictDataclassError, match="between 0 and 60, got '61'"):
        Step3TextForCausalLM(config)


def test_what_the_whole_config_shows_of_the_text():
    config = Step3VLConfig(num_hidden_layers=8, vocab_size=200000)
    assert config.text_config.moe_layers == list(range(1, 8)) and config.text_config.vocab_size == 200000
    config.vocab_size = 150000
    assert (config.text_config.vocab_size, config.num_hidden_layers) == (150000, 8)
    saved = {**config.to_dict(), "vocab_size": 5, "num_hidden_layers": 3}  # what a file holds beside its text config
    assert "vocab_size" not in config.to_dict() and Step3VLConfig.from_dict(saved).to_dict() == config.to_dict()
