import pytest
import torch
from conftest import small_batch, small_model
from transformers import Trainer, TrainingArguments

from step3_vl import Step3TextForCausalLM, Step3VLForConditionalGeneration


pytestmark = pytest.mark.releases


@pytest.mark.parametrize("part", ["whole", "text"])
def test_evaluation_has_the_models_loss_and_logits(tmp_path, part):
    """Also with next to no label smoothing, whose loss must know that labels are the next tokens."""
    model = small_model()
    batch = small_batch(model)
    if part == "text":
        model = Step3TextForCausalLM._from_config(model.config.text_config).eval()
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**batch)
    options = {"per_device_eval_batch_size": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    for factor in (0.0, 1e-9):
        arguments = TrainingArguments(tmp_path, label_smoothing_factor=factor, **options)
        prediction = Trainer(model, arguments, data_collator=lambda samples: dict(batch)).predict([0, 1, 2])
        assert prediction.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        torch.testing.assert_close(torch.tensor(prediction.predictions), expected.logits)


@pytest.mark.parametrize("shard_size, experts", [("5GB", "eager"), ("60KB", "eager"), ("60KB", "mapped")])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path, shard_size, experts, monkeypatch):
    """`Trainer` saves under the names on disk and hands them to `load_state_dict`."""
    batch = small_batch(small_model())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def trainer(model):
        save = model.save_pretrained
        monkeypatch.setattr(model, "save_pretrained", lambda *a, **k: save(*a, **{**k, "max_shard_size": shard_size}))
        arguments = TrainingArguments(
            tmp_path, max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        collate = lambda samples: {**batch, "labels": labels}  # noqa: E731
        return Trainer(model, arguments, train_dataset=list(range(64)), data_collator=collate)

    def load(seed):
        small_model(seed=seed).save_pretrained(tmp_path / str(seed))
        return Step3VLForConditionalGeneration.from_pretrained(tmp_path / str(seed), experts_implementation=experts)

    undisturbed, resumed = load(0), load(1)
    trainer(undisturbed).train()
    trainer(resumed).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    torch.testing.assert_close(resumed.state_dict(), undisturbed.state_dict())
