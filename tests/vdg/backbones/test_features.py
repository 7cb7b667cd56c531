"""The feature backbone's loss, its gradients and its decoding."""

import pytest
import torch
from torch.nn import functional

from cluster.errors import UserError
from tests import tiny
from vdg.backbones.features import FeatureBackbone
from vdg.backbones.language import collate
from vdg.config import GenerateConfig
from vdg.description import Description
from vdg.prompts import answer_ids, pair_prompt

TOKENS, DIM = 2, 8  # of the `embeddings` fixture

GREEDY = GenerateConfig(batch_size=8, greedy=True, max_new_tokens=9)


def _backbone(vdg, stage) -> FeatureBackbone:
    return FeatureBackbone(Description(stage=stage, tokens=TOKENS, dim=DIM, vdg=vdg))


@pytest.fixture
def generator(vdg) -> FeatureBackbone:
    torch.manual_seed(1)
    model = _backbone(vdg(), "instruct")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # as after training: LoRA has an effect
    return model.eval()


def _features(rows: int, images: int = 2) -> torch.Tensor:
    return torch.randn(rows, images, TOKENS, DIM, generator=torch.Generator().manual_seed(2))


def _asked(model: FeatureBackbone, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch to generate from."""
    prompt = pair_prompt(model.tokenizer, "short", TOKENS * 3)
    return {"features": features, "ids": torch.tensor([prompt] * len(features))}


def _batch(model: FeatureBackbone, texts: list[str]) -> dict[str, torch.Tensor]:
    prompt = pair_prompt(model.tokenizer, "short", TOKENS * 3)
    return {
        "features": _features(len(texts)),
        **collate([prompt] * len(texts), [answer_ids(model.tokenizer, text, 32) for text in texts]),
    }


def test_loss_equals_a_full_vocabulary_computation(generator):
    texts = ["red", "a yellow bag with no label", "two apples"]
    batch = _batch(generator, texts)
    prompt = pair_prompt(generator.tokenizer, "short", TOKENS * 3)
    losses = []
    for row, text in enumerate(texts):  # one by one, without padding, over every position
        answer = answer_ids(generator.tokenizer, text, 32)
        ids = torch.tensor([prompt + answer])
        logits = generator.language_model(inputs_embeds=generator.embed(ids, batch["features"][row : row + 1])).logits[0]
        losses.append(functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none"))
    torch.testing.assert_close(generator(batch)["loss"], torch.cat(losses).mean())


def test_both_images_count_and_in_their_order(generator):
    batch = _batch(generator, ["red", "green"])
    swapped = {**batch, "features": batch["features"].flip(1)}
    assert abs(generator(batch)["loss"] - generator(swapped)["loss"]) > 1e-4


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_only_what_the_stage_trains_gets_a_gradient(vdg, stage):
    model = _backbone(vdg(), stage)
    model(_batch(model, ["red", "green"]))["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert trained == {"projection.weight"} | lora
    assert bool(lora) == (stage == "instruct")
    assert all(part in name for name, part in zip(sorted(lora), ["q_proj", "q_proj", "v_proj", "v_proj"] * 2, strict=False))


def test_feature_dropout_only_in_training(vdg):
    model = _backbone(vdg(feature_dropout=0.5), "align")
    batch = _batch(model, ["red"])
    torch.testing.assert_close(model.eval()(batch), model(batch))
    assert float(model.train()(batch)["loss"]) != float(model.eval()(batch)["loss"])


def test_unknown_lora_target_is_named(vdg):
    with pytest.raises(UserError, match="lora_targets"):
        _backbone(vdg(lora_targets=("c_attn",)), "instruct")


@pytest.mark.parametrize("greedy", [True, False])
def test_score_equals_teacher_forcing(generator, greedy, monkeypatch):
    features, spoken = _features(6), []
    config = GenerateConfig(greedy=greedy, temperature=3.0, top_k=20, max_new_tokens=12)
    decode = generator.decode
    monkeypatch.setattr(generator, "decode", lambda *a: spoken.append(decode(*a)) or spoken[0])
    _, scores = generator.generate(_asked(generator, features), config, seed=3)
    prompt = pair_prompt(generator.tokenizer, "short", TOKENS * 3)
    for row, ids in enumerate(spoken[0][0].tolist()):
        answer = ids[: ids.index(1) + 1] if 1 in ids else ids
        batch = {"features": features[row : row + 1], **collate([prompt], [answer])}
        assert scores[row] == pytest.approx(-float(generator(batch)["loss"].detach()), abs=1e-4)


def test_greedy_decoding_does_not_depend_on_the_batch(generator):
    features = _features(8)
    together = generator.generate(_asked(generator, features), GREEDY, seed=0)
    for row in range(8):
        alone = generator.generate(_asked(generator, features[row : row + 1]), GREEDY, seed=5)
        assert alone[0] == [together[0][row]]
        assert alone[1] == pytest.approx([together[1][row]], abs=1e-4)


def test_sampling_follows_its_seed_and_leaves_torch_alone(generator):
    features, config = _features(8), GenerateConfig(temperature=5.0, max_new_tokens=9)
    state = torch.get_rng_state()
    first, again, other = (generator.generate(_asked(generator, features), config, seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_merged_lora_generates_the_same(generator):
    features = _features(8)
    before = generator.generate(_asked(generator, features), GREEDY, seed=0)
    generator.merge()
    assert not any("lora" in name for name, _ in generator.named_parameters())
    after = generator.generate(_asked(generator, features), GREEDY, seed=0)
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], abs=1e-4)


def test_the_mlp_has_two_layers_and_both_are_trained(vdg):
    model = _backbone(vdg(projection="mlp"), "align")
    model(_batch(model, ["red", "green"]))["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"projection.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    values = torch.randn(5, DIM)
    first, _, second = model.projection
    torch.testing.assert_close(model.projection(values), second(functional.gelu(first(values))))


def test_rotary_angles_follow_positions(vdg, tmp_path):
    """One layer sees its prompt as a bag of tokens unless q and k turn by position, which a cache over heads does not do."""
    model = _backbone(vdg(language_model=tiny.language_model(tmp_path, layers=1)), "align").eval()
    batch = _asked(model, _features(1))
    order = torch.randperm(batch["ids"].shape[1] - 1, generator=torch.Generator().manual_seed(0))
    order = torch.cat([order, torch.tensor([len(order)])])  # the last token stays: it gives the first word
    embeddings = model.embed(batch["ids"], batch["features"])

    def first_word(**positions: torch.Tensor) -> list[torch.Tensor]:
        inputs = (embeddings, embeddings[:, order])
        return [model.language_model(inputs_embeds=tokens, **positions).logits[0, -1] for tokens in inputs]

    plain, permuted = first_word()
    assert (plain - permuted).abs().max() > 1e-2
    plain, permuted = first_word(position_ids=torch.zeros_like(batch["ids"]))
    torch.testing.assert_close(plain, permuted)
