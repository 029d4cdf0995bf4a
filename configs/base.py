"""Every key there is, with its default: what the other configurations vary. Not run by itself."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "seed": 0,  # decides initialisation, order of the data, crops and masks
            # Weights to begin with: another run's workdir (its optimizer state too), an imported
            # folder, a folder of transformers, OWNER/NAME on the Hub, or a .pt file of Meta.
            "init_from": "",
            "model": {
                "name": "vjepa2",  # a file in wmjax/models
                "size": "large",  # tiny small base large huge giant gigantic
                "width": 0,  # 0: as the size says; likewise the next three
                "depth": 0,
                "heads": 0,
                "mlp_ratio": 0.0,
                "patch": 16,  # pixels of a patch, both ways
                "tubelet": 2,  # frames of a patch
                "pretrained": "",  # image model that the encoder begins as: folder or OWNER/NAME
                "position_grid": 0,  # side of its table of positions, in place of rope; 0: none
                "rope": "tiled",  # tiled: as released with V-JEPA 2; interleaved: 2.1; or sincos
                "predictor_width": 384,
                "predictor_depth": 12,
                "predictor_heads": 12,
                "loss_exp": 1.0,  # mean |prediction - target|^loss_exp / loss_exp
                "dtype": "bfloat16",  # of the products; parameters stay float32
                "remat": "dots",  # recomputed backward: none, all but products (dots), full
                "scan": True,  # one compiled block run over the depth; False: unrolled
                "attention": "auto",  # auto, xla, cudnn or triton (GPU), splash (TPU)
                "gelu": "auto",  # exact; polynomial: within 1e-4, faster; auto: it in bfloat16
                "norm": "auto",  # and the sum before it: xla; fused: a GPU kernel, for bfloat16
            },
            # One group a mask, each used on every clip; context and target are shares of the cells.
            # strategy: multi_block; block (one, scale 0.7, time 0.5); random, spatial (cell);
            # temporal (place: future, run, random; tubelets). Options: wmjax/masking.
            "mask": {
                "short": {
                    "strategy": "multi_block",
                    "blocks": 8,
                    "scale": 0.15,  # area of a block, as a share of the frame
                    "time": 1.0,  # its length, as a share of the clip
                    "aspect": (0.75, 1.5),  # height over width, drawn uniformly
                    "cell": 1,  # tokens, both ways, of the squares that blocks consist of
                    "context": 63 / 256,
                    "target": 124 / 256,
                },
                "long": {
                    "strategy": "multi_block",
                    "blocks": 2,
                    "scale": 0.7,
                    "time": 1.0,
                    "aspect": (0.75, 1.5),
                    "cell": 1,
                    "context": 16 / 256,
                    "target": 176 / 256,
                },
            },
            "data": {
                "source": "lerobot",  # lerobot, or synthetic: generated moving shapes
                "root": "",  # folder of a LeRobot dataset (the one that holds meta/)
                "repo_id": "",  # or its name on the Hugging Face Hub, OWNER/NAME
                "revision": "",  # of repo_id: branch, tag or commit; empty: main
                "reader": "native",  # or lerobot: by LeRobotDataset itself, slower
                "mixture": "",  # several, in place of root: DIR:WEIGHT,DIR:WEIGHT
                "members": {},  # what differs in one of them: {folder's name: {"cameras": "top"}}
                "cameras": "all",  # all: views of a clip; each: clips of their own; or a,b
                "state": "observation.state",  # feature that becomes state_BTS
                "action": "action",  # feature that becomes action_BTPA
                "frames": 16,  # of a clip
                "fps": 4.0,  # wanted; the stride is rounded so that no clip is faster
                "stride": 0,  # recorded frames from one sampled to the next; 0: as fps asks
                "ends": "drop",  # starts whose clip leaves the episode; repeat: the last frame
                "clips_per_episode": 0,  # drawn in one pass, at random; 0: every start once
                "image_size": 256,  # height of the training clips in pixels
                "image_width": 0,  # 0: square
                "batch_size": 24,  # instants a step, over all devices
                "crop_scale": (0.3, 1.0),  # area of the random crop, as a share of the frame
                "crop_aspect": (0.75, 1.35),  # width over height, log-uniform
                "val_share": 0.05,  # share of the episodes held out (at least one)
                "threads": 16,  # clips read at once
                "workers": -1,  # processes that read; -1: threads or cores, the fewer; 0: none
                "prefetch": 0,  # clips decoded ahead; 0: two batches
                "on_error": "raise",  # a clip that cannot be read; skip: another in its place
                "max_skip_share": 0.05,  # of the clips, 400 at least; beyond it the run stops
            },
            "optim": {
                "schedule": "constant",  # after the warm-up: constant, cosine, linear
                "learning_rate": 5.25e-4,
                "start_learning_rate": 1e-4,  # at the first step of the warm-up
                "final_learning_rate": 1e-6,  # where cosine, linear and the cooldown end
                "warmup": 0.05,  # share of schedule_steps
                "cooldown": 0.0,  # share of schedule_steps, the last, that constant falls over
                "schedule_steps": 100_000,  # length that the schedules are drawn for
                "weight_decay": 0.04,
                "final_weight_decay": -1.0,  # reached along a cosine; -1: constant
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "clip_norm": 0.0,  # largest global norm of the gradients; 0: not clipped
                "ema": 0.99925,  # momentum of the target encoder
                "final_ema": -1.0,  # reached linearly; -1: constant
                "accumulate": 1,  # microbatches a step, for less memory and the same result
            },
            "train": {
                "num_steps": 100_000,  # where this run stops; no schedule depends on it
                "log_every": 20,
                "eval_every": 1_000,  # 0: never, and nothing is held out or probed
                "deterministic": False,  # bit-equal runs on GPUs too, slower
                "max_skipped": 10,  # updates left out in a row, not being finite, that end the run
                "stuck_after": 1800.0,  # seconds without a batch or a save that end it; 0: never
            },
            "eval": {
                "batches": 8,  # of held-out clips, the same ones every time
                "probe_every": 10_000,  # steps between linear probes, and one at the end; 0: never
                "probe_clips": 512,  # of the training split, and half as many held-out ones
                "labels": "auto",  # state and, if there, observation.environment_state; or a,b
            },
            "mesh": {
                "data": -1,  # devices that hold copies; -1: all that fsdp leaves
                "fsdp": 1,  # devices over which parameters, moments and target are split
            },
            "checkpoint": {
                "every": 1_000,
                "keep": 3,
                "verify": True,  # hash the files before they are read, against their manifest
            },
            "log": {
                "tensorboard": False,
                "wandb": False,
                "wandb_project": "wmjax",
                "figures": True,  # at validation, to either of the two (extra: viz)
            },
        }
    )
