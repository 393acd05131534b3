"""Text, tokenizer, training and verdict of the primary model in one command, sized for the GPU.

    python -m colab_train_eco --max_steps 500 --save_interval 100 --log_interval 10 --compile
    python -m colab_train_eco --drive /content/drive/MyDrive/Aria             # survives the
        machine: run it again, it goes on
    python -m colab_train_eco --allow_cpu --preset tiny --max_steps 50        # no GPU: a small try

Takes every flag of train and of prepare. Stages, one line each, skipped when their result is there:
1 GPU and tier, 2 text, 3 tokenizer, 4 token files, 5 training, 6 the runbook's verdict (exit 1 when
a hard criterion fails). The same command again continues the run (--no_resume_latest or --if_exists
archive: a fresh one). When the hub cannot be reached, the synthetic starter corpus is used instead,
in a folder of its own, and that is said every time. This is the one command that calls another one,
train.
"""
import dataclasses
from itertools import count
from pathlib import Path

import cli
import config
from common.console import UserError, check_packages, say

if __name__ == "__main__":
    # before the heavy imports: --help has to be instant
    cli.answer_help(config.ColabArgs, "colab_train_eco")
    check_packages()

import train
from text import build, starter

# the starter corpus with this command's settings; with others: data/one_shot_2 and so on
ONE_SHOT_DIR = "data/one_shot"


def gpu(device):
    """(name, bytes of memory) of the GPU that would be used, CUDA's or Apple's, or (None, None)."""
    import torch  # importing this file has to be quick

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
    units = "bf16" if properties.major >= 8 else "no bf16 units"
    return f"{properties.name}, {units}", properties.total_memory


def prepare_text(args, origins):
    """Stages 2 to 4: args.data_dir as it is, or made now. Returns the folder to train on."""
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

    # the starter corpus
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

    A folder with another text is never built over, not even an earlier one of this command: a run
    may need it.
    """
    for folder in starter_folders():
        if Path(folder, "meta.json").exists():
            if build.holds(dataclasses.replace(args, data_dir=folder)):
                return Path(folder)
        elif folder != starter.FOLDER:        # that one is train's to make
            return Path(folder)


def starter_folders():
    """train's own folder, then data/one_shot, data/one_shot_2, and so on without end."""
    yield starter.FOLDER
    yield ONE_SHOT_DIR
    for number in count(2):
        yield f"{ONE_SHOT_DIR}_{number}"


def prepare_text_on_drive(args, origins):
    """prepare_text with a copy on the drive, which another machine goes on from."""
    from training import drive  # it needs torch

    drive.open_folder(args.drive)
    folders = [args.data_dir]
    if origins["data_dir"] == "default":
        folders.append(starter.FOLDER)
        there = Path(args.drive, "text").glob(f"{Path(ONE_SHOT_DIR).name}*")
        for name in sorted(path.name for path in there):
            folders.append(str(Path(ONE_SHOT_DIR).with_name(name)))
    for folder in folders:
        drive.restore_text(folder, args.drive, say)

    folder = prepare_text(args, origins)
    drive.store_text(folder, args.drive, say)
    return folder


def train_once(args, origins):
    """Stage 5 -> (the run folder, exit code, the signal that stopped it or None)."""
    from training import run_folder  # it needs torch

    # with --if_exists suffix or --resume PATH it is another one than the flags name
    run = Path(run_folder.choose(args, origins)[0] or args.run_dir)
    try:
        code, stopped = train.start(args, origins)
    except UserError as error:
        if origins["resume_latest"] != "one-shot" or not str(error).startswith("cannot resume"):
            raise
        raise UserError(
            f"{error}\n  for a fresh run: --if_exists archive (the old one is kept), or --run_name "
            "NEW"
        ) from None
    return run, code, stopped


def main(argv=None):
    found = {}

    def tier(typed):
        found["name"], found["memory"] = gpu(typed.get("device", config.TrainArgs.device))
        return config.gpu_tier(found["memory"], typed)

    args, origins = cli.parse(config.ColabArgs, argv, "colab_train_eco", tier=tier)
    if args.print_config:
        cli.announce(args, origins)
    name, memory = found["name"], found["memory"]
    if memory is None and not args.allow_cpu:
        raise UserError(
            "no CUDA GPU here: switch one on (in Colab: Runtime, Change runtime type, GPU), or add "
            "--allow_cpu "
            "to train slowly on the CPU"
        )

    # stage 1
    device = f"{name}, {memory / 1e9:.0f} GB" if memory else "CPU"
    sizes = []
    for size in ("batch_size", "grad_accum", "seq_len"):
        sizes.append(f"{size} {getattr(args, size)} ({origins[size]})")
    say(f"stage 1, device: {device}; " + ", ".join(sizes))
    if all(origins[name] == "default" for name in ("resume", "resume_latest", "ckpt", "if_exists")):
        args.resume_latest = True
        origins["resume_latest"] = "one-shot"

    # stages 2 to 4
    prepare = prepare_text_on_drive if args.drive else prepare_text
    folder = prepare(args, origins)
    if str(folder) != args.data_dir:
        args = dataclasses.replace(args, data_dir=str(folder))
        origins = origins | {"data_dir": "one-shot"}

    # stages 5 and 6; the verdict shows the samples
    say(
        f"stage 5, training: {args.model}, {args.n_layers} layers of width {args.d_model}, "
        f"{args.max_steps} steps on {folder}"
    )
    run, code, stopped = train_once(dataclasses.replace(args, show_samples=False), origins)
    if stopped:
        say("no verdict on a run that was stopped: the same command again continues it")
        return code
    return judge(run, args) or code


def judge(run, args):
    """Stage 6: samples and verdict of the run -> exit code, and what to type next."""
    from evaluation import check_run  # it needs torch

    say(f"stage 6, verdict: samples and the runbook's criteria for {run}")
    settings = dataclasses.replace(config.EvaluateArgs(), device=args.device)
    passed = check_run.passed(check_run.check(run, settings, args.show_samples))

    commands = [
        command
        for _, command in config.next_commands(run, args.max_steps, args.max_steps, args.source)
    ]
    print("next: " + "\n      ".join(commands))
    kind = "eco_hybrid" if args.model == "primary" else "diffusion"
    print(f"      (python -m diffusion.sample_{kind} is the older name of sample)")
    return 1 if passed is False else 0


if __name__ == "__main__":
    cli.run(main)
