"""Every family: the blocks' loss and gradients against those of the whole model, as transformers computes them."""

import copy

import pytest
import torch
from tiny_models import DECODERS, IMAGES, TIED, WITH_AUX, image_batch, make_model, token_batch
from torch import nn
from torch.func import functional_call

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline.partition import merged_state_dict, split


CUTS = ([0, 1, 4], [0, 3, 4], [0, 1, 2, 4], [0, 2, 3, 4])


def run_whole(model, batch):
    loss = model(**batch, use_cache=False).loss if "input_ids" in batch else model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def run_blocks(blocks, batch):
    """Loss and gradients as workers make them: detached at each cut, `.grad` filled by `backward`."""
    boundary, flights = (), []
    for block in blocks:
        leaves = tuple(x.detach().requires_grad_() for x in boundary)
        boundary = block(leaves, batch)
        assert all(x.is_floating_point() for x in boundary)
        flights.append((leaves, boundary))
    loss = boundary[0]
    loss.backward()
    for (_, outputs), (leaves, _) in reversed(list(zip(flights[:-1], flights[1:], strict=True))):
        for output, leaf in zip(outputs, leaves, strict=True):
            if output.requires_grad and leaf.grad is not None:
                output.backward(leaf.grad, retain_graph=True)
    gradients = {name: p.grad for block in blocks for name, p in block.named_parameters()}
    return loss.detach(), gradients


def run_both(model, bounds, batch, **options):
    whole = copy.deepcopy(model)
    return run_whole(whole, batch), run_blocks(split(model, bounds, **options), batch)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("bounds", CUTS, ids=str)
def test_untied_decoders_are_equal_bit_for_bit(family, bounds):
    for batch in (token_batch(), token_batch(left=True), token_batch(num_items=40)):
        whole, blocks = run_both(make_model(*DECODERS[family]), bounds, batch)
        torch.testing.assert_close(blocks, whole, rtol=0, atol=0)
        assert all(gradient.abs().sum() > 0 for gradient in whole[1].values())


def test_what_the_batches_vary_changes_the_loss():
    model = make_model(*DECODERS["llama"])
    batches = (token_batch(), token_batch(left=True), token_batch(num_items=40))
    assert len({run_blocks(split(model, [0, 2, 4]), batch)[0].item() for batch in batches}) == 3


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("bounds", CUTS, ids=str)
def test_the_gradients_of_a_tied_embedding_sum_up(family, bounds):
    model = make_model(*TIED[family])
    (loss, whole), (split_loss, parts) = run_both(model, bounds, token_batch())
    assert torch.equal(split_loss, loss)
    owner = parts.pop("lm_head.weight")
    name = next(name for name in whole if name not in parts or whole[name].shape == owner.shape)
    torch.testing.assert_close(parts.pop(name) + owner, whole.pop(name))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize("family", WITH_AUX)
@pytest.mark.parametrize("bounds", CUTS, ids=str)
def test_the_load_balancing_loss_is_carried_exactly(family, bounds):
    for batch in (token_batch(), token_batch(num_items=40), {**token_batch(), "attention_mask": None}):
        whole, blocks = run_both(make_model(*WITH_AUX[family]), bounds, batch)
        torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-7)
    without = run_whole(make_model(*WITH_AUX[family], output_router_logits=False), token_batch())
    assert whole[0] - without[0] > 0.1


def test_the_load_balancing_loss_of_each_block_alone():
    """Switch Transformers, Eq. (4) to (6), in plain loops over one block's rows."""
    model, batch, coefficient = make_model(*WITH_AUX["mixtral"]), token_batch(), 0.5
    router_logits = model(**batch, use_cache=False).router_logits
    rows = batch["attention_mask"].reshape(-1).bool()
    expected = 0.0
    for layers, share in ((router_logits[:1], 0.25), (router_logits[1:], 0.75)):
        logits = torch.cat([layer[rows] for layer in layers]).double().detach()
        counts, means = [0.0] * 4, [0.0] * 4
        for row in logits.softmax(-1).tolist():
            for expert in sorted(range(4), key=lambda e: -row[e])[:2]:
                counts[expert] += 1 / len(logits)
            means = [mean + value / len(logits) for mean, value in zip(means, row, strict=True)]
        expected += share * 4 * sum(f * p for f, p in zip(counts, means, strict=True))
    without = run_whole(make_model(*WITH_AUX["mixtral"], output_router_logits=False), batch)[0]
    blocks = split(model, [0, 1, 4], moe_aux="block")
    loss, gradients = run_blocks(blocks, batch)
    assert loss.item() == pytest.approx(without.item() + coefficient * expected, rel=1e-5)
    exact = run_blocks(split(make_model(*WITH_AUX["mixtral"]), [0, 1, 4]), batch)[1]
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(gradients[router], exact[router], rtol=1e-3)


def test_one_block_with_a_router_loss_is_the_model():
    whole, blocks = run_both(make_model(*WITH_AUX["mixtral"]), [0, 4], token_batch())
    torch.testing.assert_close(blocks, whole, rtol=0, atol=0)


@pytest.mark.parametrize("family, size", [("vit", 16), ("resnet", 32)])
@pytest.mark.parametrize("bounds", CUTS, ids=str)
def test_image_classifiers_are_equal_bit_for_bit(family, size, bounds):
    model = make_model(*IMAGES[family])
    whole_model, blocks = copy.deepcopy(model), split(model, bounds)
    whole = run_whole(whole_model, image_batch(size))
    torch.testing.assert_close(run_blocks(blocks, image_batch(size)), whole, rtol=0, atol=0)
    buffers = {name: buffer for block in blocks for name, buffer in block.named_buffers() if buffer.numel()}
    torch.testing.assert_close(buffers, dict(whole_model.named_buffers()), rtol=0, atol=0)  # running statistics
    items = {**image_batch(size), "num_items_in_batch": 10}
    assert run_blocks(blocks, items)[0].item() == pytest.approx(whole[0].item() * 4 / 10, rel=1e-5)


@pytest.mark.parametrize("labels", [torch.rand(4, 5).round(), torch.rand(4, 5)], ids=["multi_label", "regression"])
def test_losses_that_are_no_cross_entropy_count_their_items(labels):
    kind = "regression" if labels.frac().any() else "multi_label_classification"
    model = make_model(*IMAGES["vit"], problem_type=kind)
    batch = {**image_batch(16), "labels": labels}
    whole, blocks = run_both(model, [0, 2, 4], batch)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=0)
    halves = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    blocks = split(make_model(*IMAGES["vit"], problem_type=kind), [0, 2, 4])
    losses = [run_blocks(blocks, {**half, "num_items_in_batch": labels.numel()})[0] for half in halves]
    assert sum(losses).item() == pytest.approx(whole[0].item(), rel=1e-5)


def test_a_vit_in_bfloat16_after_its_split():
    blocks = [block.to(torch.bfloat16) for block in split(make_model(*IMAGES["vit"]), [0, 1, 2, 4])]
    batch = {**image_batch(16), "pixel_values": image_batch(16)["pixel_values"].bfloat16()}
    boundary = blocks[1](blocks[0]((), batch), batch)
    assert boundary[0].dtype == torch.bfloat16
    assert blocks[2](boundary, batch)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("table, family", [(t, f) for t in (DECODERS, TIED, WITH_AUX, IMAGES) for f in t])
def test_the_union_of_state_dicts_loads_into_transformers(table, family):
    model = make_model(*table[family])
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = split(model, [0, 1, 3, 4])
    merged = merged_state_dict([block.state_dict() for block in blocks], blocks[0].tied)
    assert merged.keys() == expected.keys()
    fresh = make_model(*table[family])
    nn.init.zeros_(next(fresh.parameters()))
    fresh.load_state_dict(merged)
    torch.testing.assert_close(fresh.state_dict(), expected, rtol=0, atol=0)


def test_weights_can_be_exchanged_for_one_forward_and_blocks_be_copied():
    block = split(make_model(*DECODERS["llama"]), [0, 2, 4])[0]
    batch = token_batch()
    (plain,) = block((), batch)
    doubled = {name: 2 * p.detach() for name, p in block.named_parameters()}
    (other,) = functional_call(block, doubled, ((), batch))
    twin = copy.deepcopy(block)
    assert not torch.equal(other, plain) and torch.equal(twin((), batch)[0], plain)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert torch.equal(twin((), batch)[0], other) and torch.equal(block((), batch)[0], plain)


def test_modes_reach_every_part_of_a_block():
    for block in split(make_model(*DECODERS["gpt2"], embd_pdrop=0.5), [0, 2, 4]):
        block.eval()
        assert not block.shell.training and not any(module.training for module in block.modules())
    assert not any(block.training for block in split(make_model(*DECODERS["gpt2"]).eval(), [0, 2, 4]))


def test_dropout_follows_the_embedding_of_the_first_block_alone():
    first, last = split(make_model(*DECODERS["gpt2"], embd_pdrop=0.5), [0, 2, 4])
    batch = token_batch()
    assert not torch.equal(first((), batch)[0], first((), batch)[0])
    boundary = first((), batch)
    assert torch.equal(last(boundary, batch)[1], last(boundary, batch)[1])


def test_blocks_and_model_see_every_router_once():
    model, batch = make_model(*WITH_AUX["mixtral"]), token_batch()
    run_blocks(split(model, [0, 2, 4]), batch)
    assert len(model(**batch, use_cache=False).router_logits) == 4


def test_what_a_block_needs_and_does_not_get_is_named():
    first, last = split(make_model(*DECODERS["llama"]), [0, 2, 4])
    batch = token_batch()
    with pytest.raises(InputError, match=r"input_ids is missing.*attention_mask"):
        first((), {**batch, "input_ids": None})
    with pytest.raises(InputError, match="labels is missing"):
        last(first((), batch), {**batch, "labels": None})
    with pytest.raises(InputError, match="0 tensors came from the block before, and 1 are expected"):
        last((), batch)
    with pytest.raises(InputError, match="1 tensors came"):
        first(first((), batch), batch)
    image = split(make_model(*IMAGES["vit"]), [0, 2, 4])[0]
    with pytest.raises(InputError, match="pixel_values is missing"):
        image((), batch)


def test_a_resnet_is_not_cut_after_an_activation_in_place():
    model = make_model(*IMAGES["resnet"])
    model.resnet.encoder.stages[0].layers[1].activation = nn.ReLU(inplace=True)
    split(model, [0, 1, 4])
    with pytest.raises(ConfigurationError, match=r"bounds=2.*layers\.1 ends in an activation in place"):
        split(model, [0, 2, 4])
