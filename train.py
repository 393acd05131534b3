"""Train a masked-diffusion language model.

    python -m train --preset starter                     # the built-in corpus, minutes on a laptop,
        ends with samples
    python -m train --data_dir data/processed            # your own text, after python -m prepare
    python -m train --resume checkpoints/eco_hybrid_hi   # continue exactly where a run stopped
    torchrun --nproc_per_node 8 -m train --fsdp          # several GPUs or machines: docs/SCALING.md

Reads from top to bottom: data, model, optimizer, resume, then the loop. Randomness is a function of
(seed, step), never of history, so a resumed run equals the uninterrupted one bit for bit on a CPU,
and evaluating more often changes nothing. One exception: --spike_rollback goes back to the last
checkpoint, so a stop, which saves, can change where to.
"""
import collections
import contextlib
import dataclasses
import functools
import math
import shlex
import sys
import time
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError, printable, say
from common.flags import to_dict
from text import starter

NON_FINITE_LIMIT = 5  # steps in a row with a NaN or infinite loss or gradient, then the run stops
SAVE_LIMIT = 3           # saves in a row that failed, then the run stops
# steps after which the time of the whole run is said, and whether threads wait for each other
MEASURED = 20
# how far a run has come
Reached = collections.namedtuple("Reached", "step position tokens_seen skipped")
MANY_EPOCHS = 8  # docs/experiments/, 2026-11-27: from there on single tokens are learned by heart


def advised(typed):
    """Settings for a command line that asks for no size: a CPU that has the starter corpus alone
    trains the starter preset.
    """
    sizes = {*config.PRESETS["starter"], "preset", "edge_profile", "config", "data_dir", "model"}
    sizes |= {"resume", "resume_latest", "ckpt"}  # those have their own settings
    # how long, how often: of no size
    free = {"max_steps", "save_interval", "eval_interval", "eval_batches"}
    if (
        typed.keys() & (sizes - free)
        or typed.get("objective") == "ar"
        or Path(config.TrainArgs.data_dir, "meta.json").exists()
    ):
        return {}
    from common import machine
    if machine.pick_device(typed.get("device", "auto")).type != "cpu":
        return {}
    shape = model_config.model_config(config.TrainArgs(**config.PRESETS["starter"]), vocab_size=1)
    backup = dataclasses.replace(shape, model="backup")
    return config.PRESETS["starter"] | {
        "d_ff": model_config.match_d_ff(shape, model_config.count_params(backup))
    }


def find_data(args, origins):
    """The data folder; when none was asked for and none is there, the starter corpus is prepared,
    never silently.
    """
    folder = Path(args.data_dir)
    if (folder / "meta.json").exists() or origins["data_dir"] not in ("default", "checkpoint"):
        return folder
    if origins["data_dir"] == "checkpoint" and args.data_dir != starter.FOLDER:
        return folder
    from text.build import build

    say(
        "notice: no prepared text in data/processed, so the built-in starter corpus is used "
        "(synthetic Hindi and Hinglish,\n"
        "        written by a program; for your own text: python -m prepare --source files --input "
        "FILES)"
    )
    build(config.starter_args(), say)
    return Path(starter.FOLDER)


def compile_step(model, args, shape, device):
    """Compile the layers' training form; if that fails, say why and go on uncompiled.

    All layers share their graphs: one for each block rule, with and without a shorter first block,
    the last layer apart. What changes from step to step (where block 0 ends, which early exit)
    stays outside, so that nothing is compiled in mid-run.
    """
    import torch
    # beyond its own 8 graphs, PyTorch would go on in eager silently
    torch._dynamo.config.recompile_limit = 64
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, mode=args.compile_mode, dynamic=False)
    started = time.perf_counter()
    try:
        ids = torch.zeros(shape, dtype=torch.long, device=device)
        forms = [
            (block, first) for block in args.block_rules for first in {block, max(1, block - 1)}
        ]
        say(
            f"compile: {len(forms)} forms of a step; on a CPU that takes minutes (each is kept for "
            "the next run)"
        )
        for number, (block, first) in enumerate(forms, 1):
            model.block_states(ids, ids, block, first).sum().backward()
            say(
                f"compile: form {number} of {len(forms)}, {time.perf_counter() - started:.0f} s so "
                "far"
            )
        model.zero_grad(set_to_none=True)
        say(f"compile: every block rule in {time.perf_counter() - started:.0f} s")
    except Exception as error:  # whatever a compiler, its C++ toolchain or its cache may raise
        for layer in model.layers:
            del layer.forward
        model.zero_grad(set_to_none=True)
        say(
            f"compile: failed, going on uncompiled: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}"
        )
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        say(
            "compile: if it fails each time, a compiler that was killed may have left half a "
            f"file: delete {cache_dir()}"
        )


def main(argv=None, pinned=None):
    # --help and usage errors end here, before torch is imported
    args, origins = cli.parse(config.TrainArgs, argv, "train", pinned, None if pinned else advised)
    return start(args, origins)[0]


def start(args, origins):
    """Train with these arguments, alone or as one of torchrun's processes; -> exit code, the signal
    that stopped it.
    """
    from training import distributed, run_folder
    if args.print_config:
        cli.announce(args, origins)
    stopped = None
    with distributed.process_group(args) as ranks:
        run_dir, source, resuming = ranks.broadcast_object(
            run_folder.choose(args, origins) if ranks.main else None
        )
        if run_dir is None:
            say(f"skipped: {args.run_dir} already holds a run and --if_exists skip was given")
            ranks.code = 0
        else:
            with run_folder.locked(Path(run_dir)) if ranks.main else contextlib.nullcontext():
                ranks.code, stopped = train(args, origins, ranks, Path(run_dir), source, resuming)
    return ranks.code, stopped


def train(args, origins, ranks, run_dir, source, resuming):
    import torch

    import checkpoint
    import masking
    from common import machine
    from common.files import replace_file, to_json
    from evaluation import run_report
    from evaluation.estimators import bits_per_byte, held_out
    from model import build_model
    from sampling.decode import generate
    from sampling.settings import Settings
    from text.dataset import TokenData, Windows
    from text.tokenizer import Tokenizer
    from training import drive, logs, optim, recovery, run_folder

    # ---- data ------------------------------------------------------------------------------------
    logs.check_sinks(args)
    allocator = machine.start(args.threads)
    device = machine.pick_device(args.device)
    if (
        args.preset in config.GPU_ONLY_PRESETS
        and device.type == "cpu"
        and origins["device"] != "flag"
    ):
        raise UserError(
            f"--preset {args.preset} is made for GPUs and there is none here: add --device cpu to "
            "train it on the "
            "CPU nevertheless, or take --preset starter"
        )
    saved, notes = None, []
    if source:
        saved = ranks.broadcast_checkpoint(
            checkpoint.load(
                source,
                parts=() if args.fsdp else checkpoint.PARTS,
                quarantine=resuming and checkpoint.candidates(source)[0].parent == run_dir,
            )
            if ranks.main
            else None
        )
    if resuming:
        args, changes = cli.resume_check({"args": checkpoint.section(saved, "args")}, args, origins)
        notes = [f"changed on resume: {c}" for c in changes]
    cli.announce(args, origins)
    if origins["d_model"] == "tier":
        say(
            "notice: no GPU, no prepared text and no size asked for: the settings of --preset "
            "starter (--preset none: the large "
            "defaults)"
        )
    for idle in args.idle(origins):
        say(f"notice: {idle}")
    mine = ranks.share(args.batch_size, args.grad_accum)    # of the sequences of one optimizer step
    with ranks.main_first():
        data_dir = find_data(args, origins)
    args.data_dir = str(data_dir)
    stop = machine.StopFlag(ranks)  # listens from the loop on; before it there is nothing to save
    data = TokenData(data_dir, "train")
    # without: nobody asks held-out text
    scores = args.eval_interval > 0 or data.meta["val_tokens"] >= args.seq_len
    val = TokenData(data_dir, "val") if scores else None
    cfg = model_config.model_config(args, data.vocab_size)
    windows = Windows(data, args.seq_len, args.seed)
    tokenizer = Tokenizer(data.tokenizer_path)
    if saved and ranks.main and saved.tokenizer_bytes != tokenizer.model_bytes:
        old = Tokenizer(saved.tokenizer_bytes)
        raise UserError(
            f"{data_dir} has a tokenizer of {cfg.vocab_size} pieces ({tokenizer.sha256[:12]}), the "
            "checkpoint's has "
            f"{old.vocab_size} ({old.sha256[:12]}): "
            + data.for_run(saved.state.get("source"), saved.path / "tokenizer.model")
        )
    in_place = resuming and run_dir.resolve() == saved.path.parent.resolve()
    state = run_folder.counters(saved) if resuming else None
    if in_place and state["data_sha256"] != data.meta["train_sha256"]:
        raise UserError(
            f"{data_dir} has changed since this run began (sha256 "
            f"{data.meta['train_sha256'][:12]}, the checkpoint "
            f"{state['data_sha256'][:12]}): {data.old_text(saved.state.get('source'))}, or fork "
            "with --run_name NEW"
        )
    first_step = saved.step if resuming else 0
    if first_step >= args.max_steps and not (resuming and state["eval_due"]):
        say(f"nothing to do: step {first_step} of {args.max_steps}")
        return 0, None

    # ---- model, optimizer, resume ----------------------------------------------------------------
    dtype, why = machine.pick_precision(
        args.amp, args.amp_dtype, device, state["precision"] if resuming else None
    )
    # rank 0's, if measured
    dtype = {str(d): d for d in (None, torch.bfloat16, torch.float16)}[
        ranks.broadcast_object(str(dtype))
    ]
    if args.fsdp and dtype is torch.float16:
        raise UserError("--fsdp works in bf16 or float32: add --no_amp, or use GPUs with bf16")
    room = recovery.check_memory(
        cfg, args, min(args.batch_size, mine.stop - mine.start), device, ranks.world
    )
    machine.seed_everything(args.seed)
    # a fork takes the averaged ones
    weights = saved and ("ema" if "ema" in saved.files and not resuming else "model")
    if saved and ranks.main and not args.fsdp:
        checkpoint.may_fit(cfg, saved.model)
    model = build_model(cfg)
    if saved and ranks.main and not args.fsdp:
        checkpoint.load_into(model, getattr(saved, weights))
    model = ranks.to_device(model, device, dtype, saved and saved.files[weights])
    loss_of = masking.DenoisingLoss(model)  # becomes ranks.replicate's just before the loop
    model.recompute = args.activation_checkpointing
    optimizer = optim.make_optimizer(model, args)
    ema = optim.EMA(model, args.ema) if args.ema else None
    scaler = optim.LossScaler(optimizer, device, on=dtype is torch.float16)
    spikes = recovery.SpikeWatch(args.spike_factor)

    def restore(saved, with_optimizer=True):
        """Everything but the weights -> best validation, that of `best`, skipped, position,
        tokens_seen, rollbacks.
        """
        state = run_folder.counters(saved)
        if with_optimizer:
            optimizer.load_state_tensors(ranks.load_aux(saved, "optimizer", model))
        if ema and "ema" in saved.files:
            ema.load(ranks.load_aux(saved, "ema", model), state["ema_updates"])
        scaler.load(state["scaler"])
        spikes.load(state["losses"])
        alike = run_folder.same_validation(saved.config, saved.state, args, data.meta)
        bests = [
            math.inf if state[key] is None or not alike else state[key] for key in ("best", "kept")
        ]
        return *bests, *(state[key] for key in ("skipped", "position", "tokens_seen", "rollbacks"))

    best, kept, skipped, position, tokens_seen, rollbacks = math.inf, math.inf, 0, 0, 0, 0
    fresh = not resuming or "optimizer" not in saved.files or args.reset_optimizer
    if resuming:
        best, kept, skipped, position, tokens_seen, rollbacks = restore(saved, not fresh)
        best, kept = (best, kept) if in_place else (math.inf, math.inf)
        notes += ["the optimizer starts fresh"] if fresh else []
        if in_place and state["val_sha256"] not in (None, data.meta["val_sha256"]):
            notes.append(
                "the validation text is not the one of before: no earlier figure compares, `best` "
                "starts anew"
            )
        notes += run_folder.rate_jump(saved, args, first_step)
    run_id = logs.wandb_id(args, state["wandb_id"] if in_place else None)
    rows = args.batch_size * args.grad_accum                # sequences of one optimizer step
    step_tokens = rows * args.seq_len
    params = model_config.count_params(cfg)
    peak = ranks.all_reduce_sum(machine.peak_flops(device, dtype))
    say(
        f"model: {args.model}, {params:,} parameters, d_ff {args.d_ff}; device {device}, "
        f"{torch.get_num_threads()} threads"
        f"{f', {ranks.world} processes' if ranks.world > 1 else ''}{', sharded' if args.fsdp else ''}; "
        f"precision {why}; memory: {allocator}"
    )
    planned = args.max_steps * step_tokens
    epochs = planned / data.meta["train_tokens"]
    say(
        f"data: {data_dir} ({data.meta['source']}), {data.meta['train_tokens']:,} tokens, "
        f"{cfg.vocab_size} pieces; "
        f"{args.max_steps} steps of {rows} x {args.seq_len} = {planned / 1e6:.1f}M tokens, "
        f"{epochs:.2f} epochs; "
        f"run folder {run_dir}"
    )
    if first_step < args.fade * args.max_steps:
        say(
            f"blocks: of one token at first, fading into {args.train_block_sizes} until step "
            f"{round(args.fade * args.max_steps)}"
        )
    say(f"memory: {room}")
    if epochs > 2 * MANY_EPOCHS:
        say(
            f"notice: {epochs:.0f} passes over this text are far too many: it is learned by heart; "
            "advised is --max_steps "
            f"{max(1, round(MANY_EPOCHS * data.meta['train_tokens'] / step_tokens))} "
            f"({MANY_EPOCHS} passes), or more text"
        )
    elif args.fade and epochs > MANY_EPOCHS:
        say(
            f"notice: {epochs:.0f} passes over this text: single tokens unlearn after some five, "
            "--train_block_sizes T,64,32 "
            "learns on"
        )
    held = (
        val.val_windows(args.eval_batches * args.batch_size, args.seq_len)
        if val
        else windows.batch(0, args.batch_size)
    )
    held = held.to(device)
    blocks = sorted(set(args.block_choices), reverse=True)
    saved_args = {"args": to_dict(args, config.TrainArgs), "model": cfg.to_dict()}

    def averaged():
        return ema.swap() if ema else contextlib.nullcontext()

    # what is hidden in this rank's rows; ar is asked everything
    def questions(step, block, first=None):
        if args.causal:
            return masking.whole_rows(rows, args.seq_len, mine)
        return masking.corrupt(args, args.seed, step, rows, args.seq_len, block, first, mine)

    # of these rows, micro per forward -> their loss; last: ranks add up
    def gradients(x0, masks, step, micro, last=True):
        total, loss = masking.normaliser(args.loss, masks), 0.0
        early = (
            masking.pick_exit(args.n_layers, args.seed, step)
            if cfg.exits and args.n_layers > 1
            else None
        )
        for a in range(0, len(x0), micro):
            part = slice(a, a + micro)
            summing = last and a + micro >= len(x0)
            # a probe of --auto_batch is no piece: each rank probes as often as it has to
            piece = stop.piece(agreed=a == 0) if last else contextlib.nullcontext()
            with piece, contextlib.nullcontext() if summing else ranks.accumulate(loss_of):
                with machine.autocast(device, dtype):
                    out = loss_of(
                        x0[part],
                        masks,
                        args.loss,
                        total,
                        part,
                        early=early,
                        early_weight=args.exit_loss_weight,
                    )
                try:
                    scaler.scale(out.loss).backward()
                except RuntimeError as error:
                    if not args.detect_anomaly or "returned nan" not in str(error):
                        raise
                    raise UserError(
                        f"step {step + 1}: {error} (--detect_anomaly; the forward call is shown "
                        "above)",
                        1,
                    ) from None
            loss += float(out.loss.detach())
        return loss

    def probe(micro):  # one real forward and backward for each block rule
        for block in args.block_rules:
            masks = questions(0, block)
            gradients(
                windows.batch(position + mine.start, micro).to(device), masks, 0, micro, last=False
            )

    micro = min(args.batch_size, mine.stop - mine.start)    # rows per forward that fit into memory
    if args.auto_batch:
        later = 8 * params if fresh else 0  # the optimizer's state comes with the first step
        micro = recovery.measure_rows(
            probe, micro, mine.stop - mine.start, args, device, later, optimizer.zero_grad, say
        )
        # all ranks do the same number of forwards, and agree between them
        micro = ranks.all_reduce_min(micro)
    # last: the arguments have proved to be sound
    if ranks.main and not in_place and run_folder.is_used(run_dir):
        run_folder.archive(run_dir)
    if in_place:
        kept = ranks.broadcast_object(
            run_folder.rewind(run_dir, saved, kept, args, data.meta) if ranks.main else None
        )
    if args.compile:
        with machine.autocast(device, dtype):
            compile_step(model, args, (micro, args.seq_len), device)
    loss_of = ranks.replicate(loss_of)  # after the probe and the compiler: see there

    def publish(name, text):
        if not ranks.main:
            return
        try:
            replace_file(run_dir / name, text.encode(errors="replace"))
        except OSError as error:
            say(f"warning: {run_dir / name} could not be written: {error.strerror}")

    # a sharded model cannot speak by itself
    speaks = args.show_samples and ranks.main and not args.fsdp

    def speak(prompt, length):  # with randomness of its own, so that the training does not notice
        # the largest that was trained
        frozen = next((block for block in blocks if block < args.seq_len), None)
        settings = Settings(
            max_new_tokens=length,
            steps=length,
            mode="block_frozen" if frozen else "full",
            block_size=min(args.block_size, frozen or args.block_size),
            temperature=0.5,
            top_k=50,
            eos_id=tokenizer.eos_id,
        )
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        with averaged(), stop.at_once():
            return tokenizer.written(generate(model, ids, settings, [args.seed]).rows[0])

    def evaluate(step):
        model.eval()
        try:
            with torch.no_grad(), machine.autocast(device, dtype), averaged():
                score = held_out(model, held, blocks, 0, micro, 1, ranks, stop.piece)
        finally:
            ranks.reshard(model)
        nats = sum(r["nats"] for r in score.values()) / len(score)
        error = max(r["se"] for r in score.values())
        bpb = bits_per_byte(nats, val.meta)
        log.write(
            "eval",
            step=step,
            val_nelbo=nats,
            val_ci=1.96 * error,
            val_bpb=bpb,
            best=nats < best,
            val_masked_mean=sum(r["masked_mean"] for r in score.values()) / len(score),
            by_block={"T" if b >= args.seq_len else str(b): r["nats"] for b, r in score.items()},
        )
        say(
            f"eval {step}/{args.max_steps} | {args.measure} {nats:.4f} +- {1.96 * error:.4f} "
            "nats/token | "
            + (f"{bpb:.4f} bits/byte | " if bpb is not None else "")
            + " ".join(
                f"{'T' if b >= args.seq_len else b}: {r['nats']:.4f}" for b, r in score.items()
            )
        )
        for prompt in config.PROMPTS[:2] if speaks else ():
            try:
                log.write("sample", step=step, prompt=prompt, text=speak(prompt, 24))
            except FloatingPointError as error:               # NaN logits
                log.write("warn", step=step, message=f"no sample: {error}")
            except machine.Stopped:
                break
        return nats

    def still_sound(step, rows):
        """Whether training can go on from these weights: an update may have ruined them. Else it
        says so.

        One of autocast and float32 is enough. Replicas would add up what backward leaves, parts
        have none of their own, and a compiled layer has its graphs for training only: there the
        loss alone is asked.
        """
        test = recovery.sound if args.compile or ranks.world > 1 else recovery.can_learn
        contexts = (machine.autocast(device, dtype), contextlib.nullcontext())
        sound = any(test(model, held[:rows], blocks[-1], context) for context in contexts)
        ranks.reshard(model)
        if not sound:
            message = f"step {step} is not saved: its update ruined the weights, held-out text has no finite gradient any more"
            log.write("warn", step=step, message=message)
            say(f"warning: {message}; the checkpoints before it are intact")
        return sound

    def save(good, is_best, score=None):
        """Save the state after the last finite step -> whether it is there now."""
        tensors = {"model": model.state_dict(), "ema": ema.state() if ema else None}
        tensors["optimizer"] = optimizer.state_tensors()
        return ranks.save(functools.partial(write, good, is_best, score), **tensors)

    def write(good, is_best, score, **tensors):
        step = good.step
        state = {
            "tokens_seen": good.tokens_seen,
            "position": good.position,
            "skipped": good.skipped,
            "best": logs.finite(best),
            "kept": nats if is_best else logs.finite(kept),
            "ema_updates": ema.updates if ema else 0,
            "model": args.model,
            "data_sha256": data.meta["train_sha256"],
            "val_sha256": data.meta["val_sha256"],
            "score": score if score is None else logs.finite(score),
            "source": data.meta["source"],
            "environment": environment,
            "compiled": args.compile,
            "precision": str(dtype),
            "scaler": scaler.state(),
            "losses": spikes.state(),
            "rollbacks": rollbacks,
            "wandb_id": run_id,
            "eval_due": int(due and scored_step != step == good.step),
        }
        started = time.perf_counter()
        try:
            folder = checkpoint.save(
                run_dir,
                step,
                **tensors,
                state=state,
                config=saved_args,
                tokenizer_bytes=tokenizer.model_bytes,
                best=is_best,
                keep_last=args.keep_last if args.save_interval else 1,
                keep_full=args.keep_full,
            )
        # disk full, NaN: what was saved before is intact, training goes on
        except (OSError, FloatingPointError) as error:
            log.write("warn", step=step, message=f"save failed: {error}")
            say(
                f"warning: step {step} could not be saved: {error}; the checkpoints before it are "
                "intact"
            )
            return False
        log.write(
            "save",
            step=step,
            folder=folder.name,
            seconds=round(time.perf_counter() - started, 3),
            best=is_best,
        )
        say(f"saved {folder}" + ", the best so far" * is_best)
        if args.drive:
            drive.store(folder, args.drive, say)
        return True

    # ---- the loop: evaluate, save, stop, step, log; one turn more than steps ---------------------
    environment = machine.environment(device)
    with (stop, logs.Progress(args, first_step) as progress,
          torch.autograd.set_detect_anomaly(args.detect_anomaly)):
        log = logs.Events(
            logs.JsonLines(run_dir / "train.jsonl" if ranks.main else None),
            logs.open_sinks(args, run_dir, run_id, first_step + 1 if resuming else 0)
            if ranks.main
            else [],
        )
        log.write(
            "meta",
            time=time.strftime("%Y-%m-%dT%H:%M:%S"),
            version=1,
            argv=sys.argv,
            config=saved_args,
            params_total=params,
            params_blocks=model_config.block_params(cfg),
            data={
                "source": data.meta["source"],
                "tokens": data.meta["train_tokens"],
                "sha256": data.meta["train_sha256"],
            },
            planned_tokens=planned,
            precision=why,
            allocator=allocator,
            peak_flops=peak,
            **environment,
        )
        if resuming:
            log.write("resume", step=first_step, checkpoint=str(saved.path), notes=notes)
        for note in notes:
            say(f"notice: {note}")
        publish("config.json", to_json(saved_args).decode())
        timed = False                                             # the time to go was said
        bad_in_a_row, unsaved, code, saved_at = 0, 0, 0, time.monotonic()
        step, nats, scored_step, ruined_step = first_step, None, None, 0
        # the last one that is on the disk
        held_step = first_step - state["eval_due"] if resuming else -1
        while True:
            # A step that is not finite is skipped and changes no weight. So until the next finite
            # step the state to save
            # is the one before the first of them: a checkpoint never ends on a step that failed.
            if not bad_in_a_row:
                good = Reached(step, position, tokens_seen, skipped)
            last = step == args.max_steps
            # a resume does not repeat what its checkpoint holds; a step that was given up comes
            # here again
            turn = step > held_step
            due = bool(turn and args.eval_interval and (last or step % args.eval_interval == 0))
            if due and scored_step != step:
                with contextlib.suppress(machine.Stopped):  # then the resume evaluates this step
                    nats = evaluate(step)
                    best, scored_step = min(best, nats), step
            every = args.save_interval or 500
            late = args.save_minutes and ranks.broadcast_object(
                time.monotonic() - saved_at >= 60 * args.save_minutes
            )
            signal = ranks.all_reduce_max(stop.signal)                   # one rank's is everybody's
            save_due = last or signal is not None or step % every == 0 or late
            if turn and save_due and good.step > max(held_step, ruined_step, 0):
                # a stop has to be quick: then only weights under suspicion are asked, with one row
                ask = signal is None or bad_in_a_row
                rows_asked = micro if signal is None else 1
                ruined_step = good.step if ask and not still_sound(good.step, rows_asked) else 0
            if turn and save_due and good.step > max(held_step, ruined_step, 0):
                # `best`: of what was scored and saved
                is_best = scored_step == step and nats < kept
                saved_at = time.monotonic()
                if save(good, is_best, nats if scored_step == step else None):
                    unsaved, kept = 0, nats if is_best else kept
                    held_step = good.step
                else:
                    unsaved += 1
            lost = unsaved > 0 or good.step == ruined_step > 0
            if unsaved == SAVE_LIMIT or lost and (last or signal is not None):
                many = f" ({unsaved} saves failed in a row)" if unsaved else ""
                say(
                    f"error: step {good.step} is not saved{many}: the run stops; "
                    f"{run_folder.what_is_there(run_dir)}"
                )
                code = 1
                break
            if last or signal is not None:
                break

            started = time.perf_counter()
            model.train()
            lr = optim.lr_at(
                step, args.max_steps, args.lr, args.warmup, args.lr_schedule, args.min_lr_ratio
            )
            optimizer.set_lr(lr)
            # dropout
            torch.manual_seed(
                masking.step_generator(args.seed, step, "drop").initial_seed() + ranks.rank
            )
            block, first = masking.pick_blocks(
                args.block_choices, args.seq_len, args.seed, step, args.single_chance(step)
            )
            masks = questions(step, block, first)
            # (rows of this rank, T)
            x0 = windows.batch(position + mine.start, mine.stop - mine.start).to(device)
            data_ms = 1e3 * (time.perf_counter() - started)
            work = functools.partial(gradients, x0, masks, step)
            try:
                loss, micro = recovery.backing_off(
                    work, micro, len(x0), args, optimizer.zero_grad, say, ranks.world == 1
                )
            except machine.Stopped:  # nothing of this step has happened: save what was before
                optimizer.zero_grad()
                continue
            loss = ranks.all_reduce_sum(loss)
            scaler.unscale()
            gnorm = float(optim.clip_grad_norm(model, args.grad_clip))
            overflow, usual = (
                scaler.update(loss, gnorm),
                spikes.spike(loss, block) if math.isfinite(loss) else None,
            )
            position, tokens_seen = position + rows, tokens_seen + step_tokens
            if usual:
                message = f"loss {loss:.4f} is {loss / usual:.1f} times the median of the last such steps, {usual:.4f}"
                log.write("warn", step=step + 1, message=message)
                say(f"warning: step {step + 1}: {message}")
                if (
                    args.spike_rollback
                    and rollbacks < recovery.ROLLBACKS
                    and checkpoint.is_run(run_dir)
                ):
                    saved = checkpoint.load(
                        run_dir, parts=("model", "ema", "optimizer"), quarantine=True
                    )
                    checkpoint.load_into(model, saved.model)
                    # on: other text
                    best, kept, skipped, _, tokens_seen, _ = restore(saved, bool(saved.optimizer))
                    log.write("rollback", step=step + 1, to=saved.step, position=position)
                    say(
                        f"notice: back to step {saved.step}, and on with the text after window "
                        f"{position}"
                    )
                    rollbacks, bad_in_a_row = rollbacks + 1, 0
                    step = held_step = saved.step
                    scored_step = None
                    optimizer.zero_grad()
                    continue
            if math.isfinite(loss) and math.isfinite(gnorm):
                optimizer.step()
                if ema:
                    ema.update()
                bad_in_a_row = 0
            elif overflow:
                log.write(
                    "warn",
                    step=step + 1,
                    message="float16 overflow: step skipped, the loss scale is halved",
                )
            else:
                skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
                log.write(
                    "warn", step=step + 1, message="loss or gradient is not finite: step skipped"
                )
                say(
                    f"warning: step {step + 1}: loss {loss}, gradient norm {gnorm}: not finite, "
                    "step skipped"
                )
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            rate, memory = masks.masked_count / step_tokens, machine.peak_memory_mb(device)
            mfu = (
                step_tokens
                / seconds
                * model_config.train_flops(cfg, args.seq_len, block, rate)
                / peak
            )
            progress.step(
                step + 1,
                step_tokens,
                seconds,
                loss=loss,
                bound=nats,
                gnorm=gnorm,
                mask=rate,
                mfu=mfu,
                memory=memory,
            )
            log.write(
                "train",
                step=step + 1,
                loss=logs.finite(loss),
                loss_kind=args.loss,
                mask=rate,
                lr=lr,
                gnorm=logs.finite(gnorm),
                tok_s=step_tokens / seconds,
                mfu=mfu,
                seq_len=args.seq_len,
                block=block,
                first=first,
                global_batch=rows,
                tokens_seen=tokens_seen,
                step_ms=1e3 * seconds,
                data_ms=data_ms,
                mem_mb=memory,
                skipped=skipped,
                overflows=scaler.overflows,
            )
            if (
                step == first_step
                or (step + 1) % args.log_interval == 0
                or step + 1 == args.max_steps
            ):
                progress.line(
                    f"step {step + 1}/{args.max_steps} | loss {loss:.4f} | mask {rate:.2f} | lr "
                    f"{lr:.1e} | "
                    f"gnorm {gnorm:.2f} | tok/s {progress.tok_s:.0f} | ETA {progress.eta} | MFU "
                    f"{mfu:.0%} | "
                    f"{memory / 1024:.1f} GB"
                )
            measured = step + 1 - first_step
            if (
                not timed
                and (measured == MEASURED or measured > 2 and progress.elapsed > 30)
                and step + 1 < args.max_steps
            ):
                timed = True
                say(
                    f"speed: {progress.eta} to go, measured on {measured} steps"
                    + machine.advice_on_threads(device)
                )
            if bad_in_a_row == NON_FINITE_LIMIT:
                if good.step > max(held_step, ruined_step, 0) and still_sound(good.step, micro):
                    save(good, False)  # what the advice below goes on from
                cause = recovery.likely_cause(
                    model,
                    held[:8],
                    blocks[-1],
                    lambda: machine.autocast(device, dtype),
                    loss,
                    gnorm,
                    range(position - NON_FINITE_LIMIT * rows, position),
                    args.lr,
                    saved=checkpoint.is_run(run_dir),
                )
                message = f"{NON_FINITE_LIMIT} steps in a row were not finite, the last is step {step + 1}; likely cause: {cause}"
                log.write("warn", step=step + 1, message=message)
                say(f"error: {message}")
                code = 1
                break
            step += 1

        # ---- the end -----------------------------------------------------------------------------
        stop.signal = ranks.all_reduce_max(stop.signal)
        unfinished = step < args.max_steps or due and scored_step != step
        stopped = stop.name if unfinished and not code else None
        log.write(
            "end",
            step=step,
            code=code,
            stopped=stopped,
            best=None if best == math.inf else best,
            seconds=progress.elapsed,
        )
        bits = None if best == math.inf else bits_per_byte(best, data.meta)
        summary = logs.summary(args, run_dir, params, data, best, bits, progress, tokens_seen, step)
        publish("summary.md", summary)
        log.close(hurry=stop.signal is not None)
        if ranks.main:
            with contextlib.suppress(OSError):                # its log cannot be read
                publish("report.html", run_report.page(run_dir / "train.jsonl"))
    if args.drive and ranks.main and checkpoint.is_run(run_dir):
        # once more, with the end of the log
        drive.store(checkpoint.candidates(run_dir)[0], args.drive, say)
    say(summary)
    if stopped:
        program = "python" if ranks.world == 1 else "torchrun ..."
        say(
            f"stopped by {stopped} at step {step}"
            + f", saved; to go on: {program} -m train --resume {shlex.quote(str(run_dir))}"
            * (held_step > 0)
        )
        if machine.by_torchrun():
            say(
                "notice: if the signal was sent to torchrun (Ctrl-C, kill, a scheduler), torchrun "
                "now shows a traceback that "
                "ends in SignalException and exits with 1, as it always does; the training itself "
                "has exited with 0"
            )
    elif speaks and not code:
        model.eval()
        stop.answer = "leaving out the samples; the run is finished and saved"
        try:
            with stop, contextlib.suppress(machine.Stopped):
                for prompt in config.PROMPTS:
                    print(f"{prompt}{printable(speak(prompt, 48))}\n---", flush=True)
        except FloatingPointError:  # NaN logits
            say(
                "error: the trained weights give no finite answer, so there are no samples: --lr "
                f"{args.lr:g} is too high; "
                f"train again with a lower one, such as {config.RATES[args.optimizer]:g}"
            )
            code = 1
    return code, stopped


if __name__ == "__main__":
    cli.run(main)
