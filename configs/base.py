"""Every key with its default. The other configurations vary it; it is not run by itself.

A key that is empty(TYPE) has no value until one is given; --config.KEY= empties it again.
"""

import ml_collections
from ml_collections.config_dict import placeholder as empty


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "seed": 0,  # of initialisation, order of the data, crops and masks
            # Weights to begin with: another run's workdir (its optimiser state too, unless
            # optim.freeze is set), an imported folder, a folder of transformers, OWNER/NAME on the
            # Hub, or a .pt file of Meta. Empty: random.
            "init_from": "",
            "model": {
                "name": "vjepa2",  # or package.module:Name, a model of your own
                "size": "large",  # tiny small base large huge giant gigantic
                "width": empty(int),  # empty: as the size says; likewise the next three
                "depth": empty(int),
                "heads": empty(int),
                "mlp_ratio": empty(float),
                "patch": 16,  # pixels of a patch, both ways
                "tubelet": 2,  # frames of a patch
                "pretrained": "",  # image model to start the encoder from: folder or OWNER/NAME
                "position_grid": empty(int),  # side of its table of positions, in place of rope
                "rope": "tiled",  # tiled: as released with V-JEPA 2; interleaved: 2.1; or sincos
                "predictor_width": 384,
                "predictor_depth": 12,
                "predictor_heads": 12,
                "loss_exp": 1.0,  # mean |prediction - target|^loss_exp / loss_exp
                # The keys from here on change how the model is computed, not what it computes.
                "dtype": "bfloat16",  # of matrix products: bfloat16, float32; parameters: float32
                "remat": "dots",  # recomputed backward: none; dots: all but the products; full: all
                "scan": True,  # True: compile one block and scan it; False: unroll, faster steps
                "attention": "auto",  # xla; cudnn, triton (GPU); splash (TPU); auto: the fastest
                "gelu": "auto",  # exact; polynomial (within 1e-4); auto: polynomial in bfloat16
                "norm": "auto",  # xla; fused (one GPU kernel, bfloat16); auto: fused where it runs
            },
            # One group for each mask; every clip gets all of them. context and target: shares of
            # the cells. strategy: multi_block; block (one, scale 0.7, time 0.5); random, spatial
            # (cell); temporal (place: future, run, random; tubelets); package.module:function.
            # Options of each: wmjax/masking. {} for a model without masks.
            "mask": {
                "short": {
                    "strategy": "multi_block",
                    "blocks": 8,
                    "scale": 0.15,  # area of a block, as a share of the frame
                    "time": 1.0,  # length of a block, as a share of the clip
                    "aspect": (0.75, 1.5),  # height / width of a block, drawn uniformly
                    "cell": 1,  # blocks consist of squares of this many tokens, both ways
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
                "source": "lerobot",  # synthetic: generated shapes; package.module:Name: your own
                "root": "",  # folder of a LeRobot dataset (the one that holds meta/)
                "repo_id": "",  # or its name on the Hugging Face Hub, OWNER/NAME
                "revision": "",  # of repo_id: branch, tag or commit; empty: main
                "reader": "native",  # lerobot: read by LeRobotDataset itself, slower
                "mixture": "",  # several datasets, in place of root: DIR:WEIGHT,DIR:WEIGHT
                "members": {},  # keys that differ in one of them: {folder: {"cameras": "top"}}
                "cameras": "all",  # all: views of one clip; each: separate clips; or names: a,b
                "state": "observation.state",  # feature that becomes state_BTS
                "action": "action",  # feature that becomes action_BTPA
                "frames": 16,  # of a clip
                "fps": 4.0,  # frames a second of a clip, at most: the stride is rounded up
                "stride": empty(int),  # recorded frames between two sampled ones; empty: by fps
                "ends": "drop",  # starts near an episode's end: drop; repeat: repeat its last frame
                "clips_per_episode": empty(int),  # random clips of a pass; empty: every start once
                "image_size": 256,  # height of the training clips in pixels
                "image_width": empty(int),  # empty: square
                "batch_size": 24,  # instants a step, over all devices
                "crop_scale": (0.3, 1.0),  # area of the random crop, as a share of the frame
                "crop_aspect": (0.75, 1.35),  # width over height, log-uniform
                "val_share": 0.05,  # share of the episodes held out (at least one)
                "threads": 16,  # clips read at once
                "workers": empty(int),  # processes that read; empty: min(threads, cores); 0: none
                "prefetch": empty(int),  # clips decoded ahead; empty: two batches
                "on_error": "raise",  # unreadable clip: raise; skip: read another in its place
                "max_skip_share": 0.05,  # skipped share (of 400 clips or more) that stops the run
            },
            "optim": {
                "schedule": "constant",  # after the warm-up: constant, cosine, linear
                "learning_rate": 5.25e-4,
                "start_learning_rate": 1e-4,  # at the first step of the warm-up
                "final_learning_rate": 1e-6,  # at the end of cosine, linear and the cooldown
                "warmup": 0.05,  # share of schedule_steps
                "cooldown": 0.0,  # last share of schedule_steps, in which constant falls
                "schedule_steps": 100_000,  # length of all schedules
                "weight_decay": 0.04,
                "final_weight_decay": empty(float),  # reached along a cosine; empty: constant
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "clip_norm": empty(float),  # largest global norm of the gradients; empty: any
                "freeze": "",  # globs of parameters that are not trained, as in encoder/**
                "ema": 0.99925,  # momentum of the target encoder
                "final_ema": empty(float),  # reached linearly; empty: constant
                "accumulate": 1,  # microbatches a step: less memory, the same result
            },
            "train": {
                "num_steps": 100_000,  # where this run stops; no schedule depends on it
                "log_every": 20,
                "eval_every": 1_000,  # 0: never; then nothing is held out or probed
                "deterministic": False,  # True: bit-equal runs on GPUs too, slower
                "max_skipped": 10,  # consecutive updates that are not finite, which end the run
                "stuck_after": 1800.0,  # seconds without a batch or a save that end it; 0: never
                "profile": "",  # steps to trace for TensorBoard and Perfetto, as in 100:110
            },
            "eval": {
                # In this order; or package.module:Name, an evaluator of your own.
                "evaluators": "validation,pictures,probe",
                "batches": 8,  # of held-out clips, the same ones every time
                "probe_every": 10_000,  # steps between linear probes, and one at the end; 0: never
                "probe_clips": 512,  # clips of the training split; held out: half as many
                "labels": "auto",  # state and observation.environment_state, if any; or names: a,b
            },
            "mesh": {
                "data": empty(int),  # devices that hold copies; empty: all / fsdp
                "fsdp": 1,  # devices over which parameters, moments and target are split
            },
            "checkpoint": {
                "every": 1_000,
                "keep": 3,  # the newest ones
                "keep_period": 0,  # also every checkpoint whose step this divides; 0: none
                "verify": True,  # check the files against their manifest before they are read
            },
            "log": {
                "tensorboard": False,
                "wandb": False,
                "wandb_project": "wmjax",
                "figures": True,  # pictures at validation, to either of the two (extra: viz)
            },
        }
    )
