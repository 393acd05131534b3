"""Data, tokenizer and training of the primary model in one command, sized for the GPU that is
there; then it judges itself.

    python -m colab_train_eco --max_steps 500 --save_interval 100 --log_interval 10 --compile
    python -m colab_train_eco --drive /content/drive/MyDrive/Aria             # survives the
        machine: run it again, it goes on
    python -m colab_train_eco --allow_cpu --preset tiny --max_steps 50        # no GPU: a small try

Takes every flag of train and of prepare. Stages, one line each, skipped when their result is there:
1 GPU and tier, 2 text, 3 tokenizer, 4 token files, 5 training, 6 the runbook's verdict (exit 1 when
a hard criterion fails). The same command again continues the run (--no_resume_latest or --if_exists
archive: a fresh one). When the hub cannot be reached, the synthetic starter corpus is used instead,
in a folder of its own, and that is said every time.
"""
import dataclasses
from itertools import chain, count
from pathlib import Path

import cli
import config
from common.console import UserError, say
from text import starter

# the starter corpus with the one-shot's settings; more of them: data/one_shot_2 ...
ONE_SHOT_DIR = "data/one_shot"


def gpu(device):
    """(name, bytes of memory) of the GPU that would be used, CUDA's or Apple's, or (None, None)."""
    import torch

    if (
        device in ("auto", "mps")
        and not torch.cuda.is_available()
        and torch.backends.mps.is_available()
    ):
        return "Apple GPU, float32", torch.mps.recommended_max_memory()
    if not device.startswith(("auto", "cuda")) or not torch.cuda.is_available():
        return None, None
    number = int(device.partition(":")[2] or 0)
    if number >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: this machine shows {torch.cuda.device_count()} CUDA devices"
        )
    properties = torch.cuda.get_device_properties(number)
    return (
        f"{properties.name}, {'bf16' if properties.major >= 8 else 'no bf16 units'}",
        properties.total_memory,
    )


def prepare_text(args, origins):
    """Stages 2 to 4: args.data_dir as it is, or made now. Returns the folder to train on."""
    from text import build
    folder = Path(args.data_dir)
    if (folder / "meta.json").exists():
        say(f"stages 2-4, text: {folder} is there, used as it is")
        return folder
    if args.skip_setup:
        raise UserError(
            f"--skip_setup, but there is no prepared text in {folder} (no meta.json): leave "
            "--skip_setup out, or "
            f"run python -m prepare --source files --input YOUR_TEXT.txt --data_dir {folder}"
        )
    if args.source != "builtin" and not args.offline:
        say(
            "stages 2-4, text: preparing "
            f"{', '.join(map(str, args.input)) or 'Hindi and Hinglish from the hub'} in {folder}"
        )
        try:
            build.build(args, say)
            return folder
        except UserError as error:
            if error.code != 3:  # only what is outside of us, like the network, has a way round
                raise
            say(f"notice: {error}")
    size = args.max_chars if origins["max_chars"] == "flag" else starter.CHARS
    args = dataclasses.replace(args, source="builtin", input=(), max_chars=size)
    if origins["data_dir"] == "default":          # keep data/processed free for real text
        folder = starter_folder(args)
    say(
        f"stages 2-4, text: the built-in starter corpus in {folder}: synthetic Hindi and Hinglish, "
        "written by a program.\n"
        "        It shows that everything works; it is no real text."
    )
    build.build(dataclasses.replace(args, data_dir=str(folder)), say)
    return folder


def starter_folder(args):
    """Where the starter corpus goes: a folder that already holds this very text, or a new one.

    A folder with another text is never built over, not even an earlier one of the one-shot: a run
    may need it.
    """
    from text import build
    for folder in chain([starter.FOLDER], (ONE_SHOT_DIR + suffix(n) for n in count(1))):
        if Path(folder, "meta.json").exists():
            if build.holds(dataclasses.replace(args, data_dir=folder)):
                return Path(folder)
        elif folder != starter.FOLDER:        # that one is train's to make
            return Path(folder)


def suffix(number):
    return f"_{number}" if number > 1 else ""


def main(argv=None):
    found = {}

    def tier(typed):
        found["name"], found["memory"] = gpu(typed.get("device", config.TrainArgs.device))
        return config.gpu_tier(found["memory"], typed)

    args, origins = cli.parse(config.ColabArgs, argv, "colab_train_eco", tier=tier)
    if args.print_config:
        cli.announce(args, origins)
    if found["memory"] is None and not args.allow_cpu:
        raise UserError(
            "no CUDA GPU here: switch one on (in Colab: Runtime, Change runtime type, GPU), or add "
            "--allow_cpu "
            "to train slowly on the CPU"
        )
    name = f"{found['name']}, {found['memory'] / 1e9:.0f} GB" if found["memory"] else "CPU"
    say(f"stage 1, device: {name}; " + ", ".join(f"{n} {getattr(args, n)} ({origins[n]})"
                                                 for n in ("batch_size", "grad_accum", "seq_len")))
    if all(origins[name] == "default" for name in ("resume", "resume_latest", "ckpt", "if_exists")):
        args.resume_latest, origins["resume_latest"] = True, "one-shot"
    if args.drive:
        from training import drive
        drive.open_folder(args.drive)
        folders = [args.data_dir]
        if origins["data_dir"] == "default":
            kept = sorted(
                path.name for path in Path(args.drive, "text").glob(f"{Path(ONE_SHOT_DIR).name}*")
            )
            folders += [
                starter.FOLDER,
                *(str(Path(ONE_SHOT_DIR).with_name(name)) for name in kept),
            ]
        for folder in folders:
            drive.restore_text(folder, args.drive, say)
    folder = prepare_text(args, origins)
    if args.drive:
        drive.store_text(folder, args.drive, say)
    if str(folder) != args.data_dir:
        args, origins = (
            dataclasses.replace(args, data_dir=str(folder)),
            origins | {"data_dir": "one-shot"},
        )
    say(
        f"stage 5, training: {args.model}, {args.n_layers} layers of width {args.d_model}, "
        f"{args.max_steps} steps on {folder}"
    )
    import train
    from training import run_folder
    show, quiet = args.show_samples, dataclasses.replace(args, show_samples=False)
    # --if_exists suffix, --resume PATH: another one
    run = Path(run_folder.choose(quiet, origins)[0] or args.run_dir)
    try:
        code, stopped = train.start(quiet, origins)
    except UserError as error:
        if origins["resume_latest"] != "one-shot" or not str(error).startswith("cannot resume"):
            raise
        raise UserError(
            f"{error}\n  for a fresh run: --if_exists archive (the old one is kept), or --run_name "
            "NEW"
        ) from None
    if stopped:
        say("no verdict on a run that was stopped: the same command again continues it")
        return code
    return judge(run, folder, args, show) or code


def judge(run, folder, args, show):
    """Stage 6: samples and verdict of the run -> exit code, and what to type next."""
    from evaluation import check_run
    say(f"stage 6, verdict: samples and the runbook's criteria for {run}")
    ok = check_run.passed(
        check_run.check(run, dataclasses.replace(config.EvaluateArgs(), device=args.device), show)
    )
    kind = "eco_hybrid" if args.model == "primary" else "diffusion"
    commands = [
        command
        for _, command in config.next_commands(run, args.max_steps, args.max_steps)
    ]
    print("next: " + "\n      ".join(commands))
    print(f"      (python -m diffusion.sample_{kind} is the older name of sample)")
    return 1 if ok is False else 0


if __name__ == "__main__":
    cli.run(main)
