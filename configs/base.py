"""Every key with its default and its effect; all other configurations start from this one.

A key with the value empty(TYPE) has no value until one is given. --config.KEY= empties it again.
"""

import ml_collections
from ml_collections.config_dict import placeholder as empty


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "seed": 0,  # PRNG seed of initialisation, data order, crops and masks
            # Weights to start from: an imported folder, a folder of transformers, OWNER/NAME on the
            # Hub, a .pt file of Meta, or another run's workdir (then also its optimiser state,
            # if both have the same optim.freeze). Empty: random weights.
            "init_from": "",
            # The encoder of init_from to start both the encoder and its EMA target from, where it
            # has several: target_encoder (EMA), encoder (trained). Empty: each from its own.
            "init_encoder": "",
            # Parts of init_from to load, as in encoder,predictor; the others get random weights.
            # Empty: all that the model has too.
            "init_parts": "",
            "model": {
                # vjepa2, vjepa21, vjepa2_ac, lewm; package.module:Name of a model of your own
                "name": "vjepa2",
                "size": "large",  # tiny, small, base, large, huge, giant, gigantic
                "width": empty(int),  # of the encoder; empty: given by size
                "depth": empty(int),  # empty: given by size
                "heads": empty(int),  # empty: given by size
                "mlp_ratio": empty(float),  # empty: given by size
                "patch": 16,  # height and width of a patch in pixels
                "tubelet": 2,  # frames of a patch
                "pretrained": "",  # image model to start the encoder from: a folder or OWNER/NAME
                "position_grid": empty(int),  # set by pretrained: side of its position table
                # tiled (V-JEPA 2), interleaved (a true rotation). No RoPE, fixed embeddings are
                # added: sincos, sincos_uniform (V-JEPA 1 with uniform_power).
                "rope": "tiled",
                "predictor_width": 384,
                "predictor_depth": 12,
                "predictor_heads": 12,
                "loss_exp": 1.0,  # mean |prediction - target|^loss_exp / loss_exp; 1: L1
                # The keys below change speed and memory. Results differ only by rounding.
                "dtype": "bfloat16",  # of matrix products: bfloat16, float32; parameters: float32
                "target_dtype": "",  # float8: of the EMA target, faster and less exact; see bench
                # Recomputed in the backward pass: none (fastest); dots: all but the products with
                # parameters; full: everything (least memory).
                "remat": "dots",
                # True: scan over depth, compiles fast; False: unroll, faster steps; None: True on a
                # CPU, else False.
                "scan": True,
                # auto: the fastest that runs here; xla; cudnn or triton (GPU); splash (TPU).
                "attention": "auto",
                "gelu": "auto",  # exact, polynomial or tanh; auto: see nn/compute.py
                "norm": "auto",  # auto: fused where it runs; fused: one GPU kernel, bfloat16; xla
            },
            # One group for each mask; every clip gets all masks. {} for a model without masks.
            # context, target: shares of the cells (tokens of one tubelet). strategy: multi_block,
            # block, random, spatial, temporal, or package.module:function. Options of each
            # strategy: wmjax/masking/README.md.
            "mask": {
                "short": {
                    "strategy": "multi_block",
                    "blocks": 8,  # number of blocks
                    "scale": 0.15,  # area of a block, as a share of the frame
                    "time": 1.0,  # length of a block, as a share of the clip
                    "aspect": (0.75, 1.5),  # height / width of a block, drawn uniformly
                    "cell": 1,  # blocks consist of squares of cell x cell tokens
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
            # Pictures beside the clips, for a model with model.image_loss: a batch of each a step.
            "images": {
                # frames: of the recordings that the clips are from; or a folder of JPEG and PNG
                # files. Empty: none.
                "source": "",
                "batch_size": 36,  # pictures a step, over all devices
                "size": 256,  # height and width in pixels
                "mask": {  # as `mask`, on the grid of a picture
                    "spread": {
                        "strategy": "multi_block",
                        "blocks": 10,
                        "scale": 0.15,
                        "aspect": (0.75, 1.5),
                        "cell": 1,
                        "context": 40 / 256,
                        "target": 150 / 256,
                    },
                },
            },
            "data": {
                "source": "lerobot",  # lerobot; synthetic: generated video; package.module:Name
                "root": "",  # folder of a LeRobot dataset, which contains meta/
                # ENV:EPISODES, as in tworoom:200: a simulator's episodes, recorded into root before
                # the first run. Empty: root is there already.
                "record": "",
                "repo_id": "",  # in place of root: OWNER/NAME on the Hugging Face Hub
                "revision": "",  # of repo_id: branch, tag or commit; empty: main
                "reader": "native",  # native; lerobot: LeRobotDataset, slower
                "mixture": "",  # in place of root: several datasets, DIR:WEIGHT,DIR:WEIGHT
                "members": {},  # other values for one dataset: {folder: {"cameras": "top"}}
                "cameras": "all",  # all: views of one clip; each: separate clips; or names: a,b
                "state": "observation.state",  # feature that becomes state_BTS
                "action": "action",  # feature that becomes action_BTPA
                "frames": 16,  # of a clip
                "fps": 4.0,  # highest frame rate of a clip: stride = ceil(recorded fps / fps)
                "stride": empty(int),  # recorded frames between sampled ones; empty: from fps
                "ends": "drop",  # clip beyond an episode's end: drop it; repeat: the last frame
                "clips_per_episode": empty(int),  # drawn in each pass; empty: every start once
                "image_size": 256,  # height of a clip in pixels
                "image_width": empty(int),  # in pixels; empty: as image_size
                "batch_size": 24,  # clips a step, over all devices; an instant's views are one clip
                "crop_scale": (0.3, 1.0),  # area of the random crop, as a share of the frame
                "crop_aspect": (0.75, 1.35),  # width / height of the crop, drawn log-uniformly
                # Folder for the features of a frozen encoder: computed once, then read in place of
                # the video. Empty: each step encodes its clips.
                "features": "",
                # device: the training frames are decoded once, at the start, and stay in device
                # memory. Empty: each step's clips are decoded.
                "cache": "",
                "episodes": "",  # which to read: numbers and slices, as in 0:50,60,-1; empty: all
                "follow_links": False,  # True: links in a dataset may lead outside its folder
                "val_share": 0.05,  # share of the episodes held out (at least one); 0: none
                "threads": 16,  # clips read at once by threads: in validation, and with workers=0
                # Processes that read clips, and that play simulators; empty: min(threads, cores);
                # 0: none.
                "workers": empty(int),
                "prefetch": empty(int),  # clips read ahead; empty: two batches
                "on_error": "raise",  # unreadable data: raise: stop; skip: leave it out
                "max_skip_share": 0.05,  # skipped share (of at least 400 clips) that stops the run
            },
            "optim": {
                "schedule": "constant",  # of the rate after the warm-up: constant, cosine, linear
                "learning_rate": 5.25e-4,  # peak
                "start_learning_rate": 1e-4,  # at the first step of the warm-up
                "final_learning_rate": 1e-6,  # at the end of cosine, linear and the cooldown
                "warmup": 0.05,  # share of schedule_steps
                "cooldown": 0.0,  # with constant: last share of schedule_steps, a linear fall
                "schedule_steps": 100_000,  # length of all schedules
                "weight_decay": 0.04,
                "final_weight_decay": empty(float),  # reached along a cosine; empty: constant
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "clip_norm": empty(float),  # largest global gradient norm; empty: no clipping
                "freeze": "",  # globs of frozen parameters, as in encoder/**,predictor/embed/*
                "ema": 0.99925,  # momentum of the EMA target
                "final_ema": empty(float),  # reached linearly; empty: constant
                "accumulate": 1,  # microbatches a step: less memory, the same update
            },
            "train": {
                "num_steps": 100_000,  # where this run stops; no schedule depends on it
                "log_every": 20,  # steps between two rows in metrics.jsonl
                "eval_every": 1_000,  # steps between validations; 0: no validation, no probe
                "deterministic": False,  # True: bit-equal results on GPUs too, slower steps
                "max_skipped": 10,  # non-finite updates in a row that end the run
                "stuck_after": 1800.0,  # seconds without a batch or a save that end it; 0: never
                "profile": "",  # steps to trace for TensorBoard and Perfetto, as in 100:110
            },
            "eval": {
                # Evaluators, in this order: validation, pictures, probe; acting (for models that
                # act), closed_loop and harness (with env); or package.module:Name.
                "evaluators": "validation,pictures,probe,acting,closed_loop",
                # Held-out batches, the same in every validation; empty: 8, in a short run a tenth
                # of its steps.
                "batches": empty(int),
                "probe_every": 10_000,  # steps between probes (and acting), one at the end; 0: none
                # Training clips of a probe; held-out clips: half as many. Empty: 512, in a short
                # run a tenth of the clips that it trains on.
                "probe_clips": empty(int),
                # Features that the probe predicts: names a,b; auto: the state, and
                # observation.environment_state if recorded.
                "labels": "auto",
                "env": "",  # simulator of the recording, to act in: tworoom, package.module:Name
                "env_episodes": 50,  # held-out starts that it acts from
                "env_goal": 25,  # recorded steps from start to goal; twice as many are allowed
                "env_goals": 1,  # 3: also goals twice and three times as far
                "env_seeds": 1,  # each draws its own starts
                "env_plan": "short",  # preset of planning, and keys: short,samples=128
            },
            "mesh": {
                "data": empty(int),  # devices with copies of the state; empty: all / fsdp
                "fsdp": 1,  # devices that share one copy of parameters, moments and target
            },
            "checkpoint": {
                "every": 1_000,  # steps between saves; the last step is always saved
                "keep": 3,  # newest checkpoints that are kept; the newest sound one is kept too
                "keep_period": 0,  # also keep all steps that are multiples of this; 0: none
                "verify": True,  # compare files with the manifest before loading
                "strict": False,  # True: refuse to resume with other data or library versions
            },
            "log": {
                "tensorboard": False,  # True: also log to WORKDIR/tensorboard
                "wandb": False,  # True: also log to Weights & Biases
                "wandb_project": "wmjax",
                "figures": True,  # pictures at validation, for TensorBoard and W&B (extra viz)
            },
        }
    )
