"""What the public torch code of LeWM, INTACT and V-JEPA 2-AC computes with random weights.

    python tests/acting_oracle.py PEERS     writes data/parity_lewm.npz and parity_vjepa2_ac.npz

PEERS holds checkouts of galilai-group/stable-worldmodel, zju3dv/INTACT-JEPA and
facebookresearch/vjepa2, under these names. Needs torch, transformers and einops; nothing of these
repositories is kept but numbers.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, DECAY = 1e-3, 0.04


def module_at(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def randomise(model, seed, spread=0.15):
    """Draw weights that half precision stores exactly, larger than at the start of training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        one = "norm" in name and name.endswith("weight") and p.ndim == 1
        p.copy_((1 + 0.2 * noise if one else spread * noise).half().float())


def arrays(prefix, tensors):
    return {f"{prefix}/{name}": value.detach().numpy() for name, value in tensors.items()}


def weights_of(model, prefix):
    return {
        f"weights/{prefix}{name}": value.detach().numpy().astype(np.float16)
        for name, value in model.named_parameters()
    }


def gradients_of(model, prefix):
    return {
        f"gradients/{prefix}{name}": np.zeros(p.shape) if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
    }


def lewm(peers):
    from transformers import ViTConfig, ViTModel

    parts = module_at(peers / "stable-worldmodel/stable_worldmodel/wm/lewm/module.py", "parts")
    family = module_at(peers / "stable-worldmodel/stable_worldmodel/wm/lewm/lewm.py", "family")
    losses = module_at(peers / "stable-worldmodel/stable_worldmodel/wm/loss.py", "losses")
    intact = module_at(peers / "INTACT-JEPA/module.py", "module")
    jepa = module_at(peers / "INTACT-JEPA/jepa.py", "jepa")

    torch.manual_seed(0)
    D, numbers, batch, frames = 16, 4, 5, 4
    vit = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=4,
        image_size=12,
    )

    class Frames(torch.nn.Module):
        """ViTModel without its pooler, which LeWM does not read."""

        def __init__(self):
            super().__init__()
            self.vit = ViTModel(vit, add_pooling_layer=False)

        def forward(self, pixels, interpolate_pos_encoding=False):
            return self.vit(pixels)

    def mlp(inputs):
        return parts.MLP(inputs, 32, D, norm_fn=torch.nn.BatchNorm1d)

    predictor = {
        "num_frames": 3,
        "depth": 2,
        "heads": 2,
        "dim_head": 8,
        "mlp_dim": 32,
        "input_dim": D,
        "hidden_dim": D,
        "output_dim": D,
    }
    actor = intact.IntentActionActor(
        embed_dim=D, action_emb_dim=D, action_dim=numbers, hidden_dim=24, depth=2
    )
    model = family.LeWM(
        Frames(),
        parts.Predictor(**predictor),
        parts.Embedder(input_dim=numbers, emb_dim=D),
        mlp(24),
        mlp(D),
    )
    model.actor = actor
    randomise(model, 1)
    model.train()
    rng = np.random.default_rng(2)
    video = rng.integers(0, 256, (batch, frames, 12, 12, 3), np.uint8)
    action = rng.standard_normal((batch, frames, numbers), np.float32)
    pixels = torch.from_numpy(((video / 255 - MEAN) / STD).astype(np.float32)).movedim(-1, 2)
    out = model.encode({"pixels": pixels, "action": torch.from_numpy(action)})
    z, embedded = out["emb"], out["act_emb"]
    following = model.predict(z[:, :3], embedded[:, :3])
    prediction_loss = (following - z[:, 1:]).pow(2).mean()
    regulariser = losses.SIGReg(num_proj=8)
    drawn = {}
    draw = torch.randn

    def recorded(*shape, **more):
        drawn["directions"] = draw(*shape, **more)
        return drawn["directions"].clone()  # SIGReg normalises it in place

    torch.randn = recorded
    sigreg = regulariser(z.transpose(0, 1))
    torch.randn = draw

    before = torch.cat([torch.zeros(batch, 1, numbers), torch.from_numpy(action)[:, :2]], dim=1)
    acting = jepa.JEPA(
        encoder=None,
        predictor=model.predictor,
        action_encoder=model.action_encoder,
        intent_actor=actor,
    )
    moves = {"inverse": z[:, 1:] - z[:, :-1], "to_goal": z[:, -1:].detach() - z[:, :-1]}
    nll = {
        name: acting.action_nll(z[:, :3], move, before, torch.from_numpy(action)[:, :3])["loss"]
        for name, move in moves.items()
    }
    total = prediction_loss + 0.09 * sigreg + 0.1 * nll["inverse"] + 0.05 * nll["to_goal"]
    total.backward()
    running = {k: v for k, v in model.state_dict().items() if "running" in k}
    record = (
        {"video": video, "action": action, "directions": drawn["directions"].numpy()}
        | weights_of(model, "")
        | arrays("out", {"z": z, "next": following, "total": total, "sigreg": sigreg})
        | arrays("out", {"prediction": prediction_loss, **nll})
        | arrays("running", running)
        | gradients_of(model, "")
    )
    model.eval()
    model.zero_grad()
    with torch.no_grad():
        seen = {"pixels": pixels[:, None, :1], "action": None}
        candidates = torch.from_numpy(rng.standard_normal((batch, 2, 5, numbers), np.float32))
        seen = {"pixels": pixels[:, None, :1].expand(-1, 2, -1, -1, -1, -1)}
        ahead = model.rollout(seen, candidates)["predicted_emb"]
    return record | {"candidates": candidates.numpy(), "out/rollout": ahead.numpy()}


def vjepa2_ac(peers):
    """One clip of 4 frames, 3 x 3 patches: forward, both losses, gradients, an AdamW step."""
    sys.path.insert(0, str(peers / "vjepa2"))
    layers = types.ModuleType("timm.models.layers")
    layers.drop_path = lambda x, *_: x
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"] = layers
    from src.models.ac_predictor import VisionTransformerPredictorAC
    from src.models.vision_transformer import VisionTransformer

    norm = {"norm_layer": lambda width: torch.nn.LayerNorm(width, eps=1e-6)}
    frames, patch, side, batch, size = 4, 4, 3, 2, 7
    encoder = VisionTransformer(
        img_size=patch * side,
        patch_size=patch,
        num_frames=64,
        tubelet_size=2,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        qkv_bias=True,
        use_rope=True,
        **norm,
    )
    predictor = VisionTransformerPredictorAC(
        img_size=patch * side,
        patch_size=patch,
        num_frames=8,
        tubelet_size=1,
        embed_dim=24,
        predictor_embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=4.0,
        action_embed_dim=size,
        **norm,
    )
    randomise(encoder, 3)
    randomise(predictor, 4)
    rng = np.random.default_rng(5)
    video = rng.integers(0, 256, (batch, frames, patch * side, patch * side, 3), np.uint8)
    action = rng.standard_normal((batch, frames - 1, size), np.float32)
    state = rng.standard_normal((batch, frames, size), np.float32)
    pixels = torch.from_numpy(((video / 255 - MEAN) / STD).astype(np.float32)).movedim(-1, 1)
    actions, states = torch.from_numpy(action), torch.from_numpy(state)
    tokens = side * side

    def normed(x):
        return functional.layer_norm(x, (x.shape[-1],))

    with torch.no_grad():
        clips = pixels.permute(0, 2, 1, 3, 4).flatten(0, 1).unsqueeze(2).repeat(1, 1, 2, 1, 1)
        h = normed(encoder(clips).view(batch, frames, -1, 24).flatten(1, 2))

    def step(z, count):
        return normed(predictor(z, actions[:, :count], states[:, :count]))

    following = step(h[:, :-tokens], frames - 1)
    z = torch.cat([h[:, :tokens], following[:, :tokens]], dim=1)
    z = torch.cat([z, step(z, 2)[:, -tokens:]], dim=1)
    ahead = z[:, tokens:]

    def loss(z):
        return torch.mean(torch.abs(z - h[:, tokens : z.shape[1] + tokens]))

    forcing, rollout = loss(following), loss(ahead)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in predictor.parameters() if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in predictor.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    (forcing + rollout).backward()
    record = (
        {"video": video, "action": action, "state": state}
        | weights_of(encoder, "encoder.")
        | weights_of(predictor, "predictor.")
        | arrays("out", {"h": h, "next": following, "ahead": ahead})
        | arrays("out", {"forcing": forcing, "rollout": rollout})
        | gradients_of(predictor, "predictor.")
    )
    optimizer.step()
    stepped = {n: p for n, p in predictor.named_parameters() if p.grad is not None}
    return record | arrays("stepped/predictor", stepped)


if __name__ == "__main__":
    for make in (lewm, vjepa2_ac):
        found = make(Path(sys.argv[1]))
        path = Path(__file__).parent / "data" / f"parity_{make.__name__}.npz"
        np.savez_compressed(path, **found)
        print(path, f"{path.stat().st_size / 1e3:.0f} kB", len(found), "arrays")
