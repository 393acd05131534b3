"""Train a masked-diffusion language model.

    python -m train --preset starter                     # the built-in corpus, minutes on a laptop, ends with samples
    python -m train --data_dir data/processed            # your own text, after python -m prepare
    python -m train --resume checkpoints/eco_hybrid_hi   # continue exactly where a run stopped

Reads from top to bottom: data, model, optimizer, resume, then the loop. Randomness is a function of (seed, step), never of
history, so a resumed run equals the uninterrupted one bit for bit on a CPU, and evaluating more often changes nothing.
"""
import contextlib
import math
import sys
import time
from pathlib import Path

import config
import shapes
from knobs import UserError

NON_FINITE_LIMIT = 5     # steps in a row with a NaN or infinite loss or gradient, then the run stops
SAVE_LIMIT = 3           # saves in a row that failed, then the run stops


def say(text):
    from tqdm import tqdm
    tqdm.write(text, file=sys.stderr)


def choose_folder(args, origins):
    """-> (run folder or None to skip, checkpoint to start from or None, whether it is a resume). Reads no weights."""
    import checkpoint
    if args.resume_latest and not checkpoint.is_run(args.run_dir):
        args.resume_latest = False               # nothing there yet: a fresh start
    resuming = bool(args.resume or args.resume_latest)
    source = args.ckpt
    if resuming:
        source = args.resume if args.resume not in (None, "latest") else args.ckpt or str(args.run_dir)
    fork = any(origins[name] == "flag" for name in ("output_dir", "run_name"))
    if resuming:
        home = checkpoint.candidates(source)[0].parent
        if not fork or home.resolve() == args.run_dir.resolve():
            return home, source, True
    run_dir = args.run_dir
    if is_used(run_dir):
        if args.if_exists == "error":
            raise UserError(f"{run_dir} already holds a run: add --resume to continue it, or choose another --output_dir")
        if args.if_exists == "skip":
            return None, source, resuming
        if args.if_exists == "suffix":
            number = 2
            while Path(f"{run_dir}_v{number}").exists():
                number += 1
            run_dir = Path(f"{run_dir}_v{number}")
    return run_dir, source, resuming


def is_used(run_dir):
    return any(p.name != "LOCK" and not p.name.startswith("previous_") for p in Path(run_dir).glob("*"))


def archive(run_dir):
    """--if_exists archive: the files of the earlier run move to previous_N/, none is lost."""
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    aside = run_dir / f"previous_{number}"
    aside.mkdir()
    for p in run_dir.glob("*"):
        if p.name != "LOCK" and not p.name.startswith("previous_"):
            p.rename(aside / p.name)
    say(f"notice: the earlier run in {run_dir} was moved to {aside}")


def find_data(args, origins):
    """The data folder; when none was asked for and none is there, the starter corpus is prepared, never silently."""
    folder = Path(args.data_dir)
    if (folder / "meta.json").exists() or origins["data_dir"] not in ("default", "checkpoint"):
        return folder
    if origins["data_dir"] == "checkpoint" and args.data_dir != config.STARTER_DIR:
        return folder
    from prepare import ensure_builtin
    say("notice: no prepared text in data/processed, so the built-in starter corpus is used (synthetic Hindi and Hinglish,\n"
        "        written by a program; for your own text: python -m prepare --source files --input FILES)")
    return Path(ensure_builtin(log=say))


def compile_step(model, args, shape, device):
    """Compile the function that the loss really calls; if that fails, say why and go on uncompiled."""
    import torch
    eager = model.hidden_blocks
    model.hidden_blocks = torch.compile(eager, mode=args.compile_mode)
    started = time.perf_counter()
    try:
        ids = torch.zeros(shape, dtype=torch.long, device=device)
        model.hidden_blocks(ids, ids, args.seq_len, args.seq_len).sum().backward()
        model.zero_grad(set_to_none=True)
        say(f"compile: first step in {time.perf_counter() - started:.0f} s")
    except Exception as error:  # whatever a compiler, its C++ toolchain or its cache may raise
        model.hidden_blocks = eager
        model.zero_grad(set_to_none=True)
        say(f"compile: failed, going on uncompiled: {type(error).__name__}: {str(error).splitlines()[0][:200]}")


def main(argv=None, pinned=None):
    args, origins = config.parse(config.TrainArgs, argv, "train", pinned=pinned)   # --help and slips: torch is not there yet
    return start(args, origins)


def start(args, origins):
    """Train with these arguments in a run folder that nobody else writes to; -> exit code."""
    import checkpoint
    if args.print_config:
        config.announce(args, origins)
    run_dir, source, resuming = choose_folder(args, origins)
    if run_dir is None:
        say(f"skipped: {args.run_dir} already holds a run and --if_exists skip was given")
        return 0
    new = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run_dir} ({error.strerror}): name another --output_dir") from None
    try:
        with checkpoint.run_lock(run_dir):
            return train(args, origins, run_dir, source, resuming)
    finally:
        if new and run_dir.exists() and not is_used(run_dir):      # it failed before it began: leave no trace
            (run_dir / "LOCK").unlink(missing_ok=True)
            run_dir.rmdir()


def train(args, origins, run_dir, source, resuming):
    import torch

    import checkpoint
    import guard
    import masking
    import optim
    import runtime
    from decode import Settings, generate
    from evaluate import bits_per_byte, held_out
    from model import build_model
    from tokenizer import Tokenizer
    from tokens import TokenData, Windows

    # ---- data -----------------------------------------------------------------------------------------------------------
    allocator = runtime.start(args.threads)
    device = runtime.pick_device(args.device)
    saved, notes = None, []
    if source:
        saved = checkpoint.load(source, parts=("model", "ema", "optimizer"),
                                quarantine=resuming and checkpoint.candidates(source)[0].parent == run_dir)
    if resuming:
        args, changes = config.resume_check({"args": checkpoint.section(saved, "args")}, args, origins)
        notes = [f"changed on resume: {c}" for c in changes]
    config.announce(args, origins)
    data_dir = find_data(args, origins)
    args.data_dir = str(data_dir)
    data, val = TokenData(data_dir, "train"), TokenData(data_dir, "val")
    cfg = shapes.model_config(args, data.vocab_size)
    windows = Windows(data, args.seq_len, args.seed)
    tokenizer = Tokenizer(data.tokenizer_path)
    if saved and saved.tokenizer_bytes != tokenizer.model_bytes:
        old = Tokenizer(saved.tokenizer_bytes)
        raise UserError(f"{data_dir} has a tokenizer of {cfg.vocab_size} pieces ({tokenizer.sha256[:12]}), the checkpoint's has "
                        f"{old.vocab_size} ({old.sha256[:12]}): prepare it with --tokenizer {saved.path / 'tokenizer.model'}")
    in_place = resuming and run_dir == saved.path.parent
    state = checkpoint.counters(saved) if resuming else None
    if in_place and state["data_sha256"] != data.meta["train_sha256"]:
        raise UserError(f"{data_dir} has changed since this run began (sha256 {data.meta['train_sha256'][:12]}, the checkpoint "
                        f"{state['data_sha256'][:12]}): give the old text, or fork with --run_name NEW")
    first_step = saved.step if resuming else 0
    if first_step >= args.max_steps:
        say(f"nothing to do: step {first_step} of {args.max_steps}")
        return 0

    # ---- model, optimizer, resume ---------------------------------------------------------------------------------------
    runtime.seed_everything(args.seed)
    if saved:
        checkpoint.may_fit(cfg, saved.model)
    model = build_model(cfg).to(device)
    if saved:
        checkpoint.load_into(model, saved.ema if saved.ema and not resuming else saved.model)
    optimizer = optim.make_optimizer(model, args)
    ema = optim.EMA(model, args.ema) if args.ema else None
    dtype, why = runtime.pick_precision(args.amp, args.amp_dtype, device, state["precision"] if resuming else None)
    scaler = optim.LossScaler(optimizer, device, on=dtype is torch.float16)
    spikes = guard.SpikeWatch(args.spike_factor)

    def restore(saved, with_optimizer=True):
        """Everything but the weights -> best, skipped, position, tokens_seen, rollbacks."""
        state = checkpoint.counters(saved)
        if with_optimizer:
            optimizer.load_state_tensors(saved.optimizer)
        if ema and saved.ema:
            ema.load(saved.ema, state["ema_updates"])
        scaler.load(state["scaler"])
        spikes.losses.clear()
        spikes.losses.extend(state["losses"])
        best = math.inf if state["best"] is None else state["best"]
        return best, *(state[key] for key in ("skipped", "position", "tokens_seen", "rollbacks"))

    best, skipped, position, tokens_seen, rollbacks = math.inf, 0, 0, 0, 0
    if resuming:
        kept = bool(saved.optimizer) and not args.reset_optimizer
        best, skipped, position, tokens_seen, rollbacks = restore(saved, kept)
        best = best if in_place else math.inf
        notes += [] if kept else ["the optimizer starts fresh"]
    rows = args.batch_size * args.grad_accum                # sequences of one optimizer step
    step_tokens = rows * args.seq_len
    params = shapes.count_params(cfg)
    say(f"model: {args.model}, {params:,} parameters, d_ff {args.d_ff}; device {device}, {torch.get_num_threads()} threads; "
        f"precision {why}; memory: {allocator}")
    say(f"data: {data_dir} ({data.meta['source']}), {data.meta['train_tokens']:,} tokens, {cfg.vocab_size} pieces; "
        f"{args.max_steps} steps of {rows} x {args.seq_len} = {args.max_steps * step_tokens / 1e6:.1f}M tokens, "
        f"{args.max_steps * step_tokens / data.meta['train_tokens']:.2f} epochs; run folder {run_dir}")
    held = val.val_windows(args.eval_batches * args.batch_size, args.seq_len).to(device)
    if not in_place and is_used(run_dir):                   # last: whatever can be wrong with the arguments is behind us
        archive(run_dir)
    if args.compile:
        with runtime.autocast(device, dtype):
            compile_step(model, args, (args.batch_size, args.seq_len), device)
    blocks = sorted(set(args.block_choices), reverse=True)
    saved_args = {"args": config.to_dict(args, config.TrainArgs), "model": cfg.to_dict()}

    def averaged():
        return ema.swap() if ema else contextlib.nullcontext()

    def publish(name, text):
        try:
            checkpoint.replace_file(run_dir / name, text.encode(), run_dir)
        except OSError as error:
            say(f"warning: {run_dir / name} could not be written: {error.strerror}")

    def evaluate(step):
        model.eval()
        with torch.no_grad(), runtime.autocast(device, dtype), averaged():
            score = held_out(model, held, blocks, 0, args.batch_size, 1)
        model.train()
        nats = sum(r["nats"] for r in score.values()) / len(score)
        error = max(r["se"] for r in score.values())
        bpb = bits_per_byte(nats, val.meta)
        log.write("eval", step=step, val_nelbo=nats, val_ci=1.96 * error, val_bpb=bpb, best=nats < best,
                  val_masked_mean=sum(r["masked_mean"] for r in score.values()) / len(score),
                  by_block={"T" if b >= args.seq_len else str(b): r["nats"] for b, r in score.items()})
        say(f"eval {step}/{args.max_steps} | bound {nats:.4f} +- {1.96 * error:.4f} nats/token | {bpb:.4f} bits/byte | "
            + " ".join(f"{'T' if b >= args.seq_len else b}: {r['nats']:.4f}" for b, r in score.items()))
        return nats

    def save(step, is_best):
        state = {"tokens_seen": tokens_seen, "position": position, "skipped": skipped, "best": None if best == math.inf else best,
                 "ema_updates": ema.updates if ema else 0, "model": args.model,
                 "data_sha256": data.meta["train_sha256"], "source": data.meta["source"],
                 "environment": environment, "compiled": args.compile, "precision": str(dtype),
                 "scaler": scaler.state(), "losses": list(spikes.losses), "rollbacks": rollbacks}
        started = time.perf_counter()
        try:
            folder = checkpoint.save(
                run_dir, step, model_state=model.state_dict(), ema_state=ema.state() if ema else None,
                optimizer_state=optimizer.state_tensors(), state=state, config=saved_args,
                tokenizer_bytes=tokenizer.model_bytes, best=is_best,
                keep_last=args.keep_last if args.save_interval else 1, keep_full=args.keep_full)
        except (OSError, FloatingPointError) as error:   # disk full, NaN: what was saved before is intact, training goes on
            log.write("warn", step=step, message=f"save failed: {error}")
            say(f"warning: step {step} could not be saved: {error}; the checkpoints before it are intact")
            return False
        log.write("save", step=step, folder=folder.name, seconds=round(time.perf_counter() - started, 3), best=is_best)
        return True

    # ---- the loop: evaluate, save, stop, step, log; one turn more than steps --------------------------------------------
    environment = runtime.environment(device)
    with (runtime.StopFlag() as stop, runtime.Progress(args, first_step) as progress,
          torch.autograd.set_detect_anomaly(args.detect_anomaly)):
        log = runtime.JsonLines(run_dir / "train.jsonl")
        log.write("meta", time=time.strftime("%Y-%m-%dT%H:%M:%S"), version=1, argv=sys.argv,
                  config=saved_args, params_total=params, params_blocks=shapes.block_params(cfg),
                  data={"source": data.meta["source"], "tokens": data.meta["train_tokens"], "sha256": data.meta["train_sha256"]},
                  planned_tokens=args.max_steps * step_tokens, precision=why, allocator=allocator, **environment)
        if resuming:
            log.write("resume", step=first_step, checkpoint=str(saved.path), notes=notes)
        for note in notes:
            say(f"notice: {note}")
        publish("config.json", checkpoint.to_json(saved_args).decode())
        bad_in_a_row, unsaved, is_best, code = 0, 0, False, 0
        step, held_step = first_step, first_step if resuming else -1
        while True:
            last = step == args.max_steps
            turn = step > held_step                               # a resume does not repeat what its checkpoint already holds
            if turn and args.eval_interval and (last or step % args.eval_interval == 0):
                nats = evaluate(step)
                is_best = is_best or nats < best
                best = min(best, nats)
            every = args.save_interval or 500
            if turn and step and (last or stop.signal is not None or step % every == 0):
                unsaved = 0 if save(step, is_best) else unsaved + 1
                is_best = is_best and unsaved > 0
            if unsaved == SAVE_LIMIT or unsaved and (last or stop.signal is not None):
                code = 1
                break
            if last or stop.signal is not None:
                break

            started = time.perf_counter()
            model.train()
            lr = optim.lr_at(step, args.max_steps, args.lr, args.warmup, args.lr_schedule, args.min_lr_ratio)
            optimizer.set_lr(lr)
            torch.manual_seed(masking.step_generator(args.seed, step, "drop").initial_seed())    # dropout
            block, first = masking.pick_blocks(args.block_choices, args.seq_len, args.seed, step)
            draw = masking.draw(args, args.seed, step, rows, args.seq_len, block, first)
            total = masking.normaliser(args.loss, draw)
            early = masking.pick_exit(args.n_layers, args.seed, step) if cfg.exits and args.n_layers > 1 else None
            x0 = windows.batch(position, rows).to(device)                          # (rows, T)
            data_ms = 1e3 * (time.perf_counter() - started)
            loss = 0.0
            for a in range(0, rows, args.batch_size):
                part = slice(a, a + args.batch_size)
                with runtime.autocast(device, dtype):
                    out = masking.denoising_loss(model, x0[part], draw, args.loss, total, part, early=early,
                                                 early_weight=args.exit_loss_weight)
                try:
                    scaler.scale(out.loss).backward()
                except RuntimeError as error:
                    if not args.detect_anomaly or "returned nan" not in str(error):
                        raise
                    raise UserError(f"step {step + 1}: {error} (--detect_anomaly; the forward call is shown above)", 1) from None
                loss += float(out.loss.detach())
            scaler.unscale()
            gnorm = float(optim.clip_grad_norm(model, args.grad_clip))
            overflow, usual = scaler.update(loss, gnorm), spikes.spike(loss) if math.isfinite(loss) else None
            position, tokens_seen = position + rows, tokens_seen + step_tokens
            if usual:
                message = f"loss {loss:.4f} is {loss / usual:.1f} times the median of the last steps, {usual:.4f}"
                log.write("warn", step=step + 1, message=message)
                say(f"warning: step {step + 1}: {message}")
                if args.spike_rollback and rollbacks < guard.ROLLBACKS and checkpoint.is_run(run_dir):
                    saved = checkpoint.load(run_dir, parts=("model", "ema", "optimizer"), quarantine=True)
                    checkpoint.load_into(model, saved.model)
                    best, skipped, _, tokens_seen, _ = restore(saved, bool(saved.optimizer))   # on: other text
                    log.write("rollback", step=step + 1, to=saved.step, position=position)
                    say(f"notice: back to step {saved.step}, and on with the text after window {position}")
                    rollbacks, bad_in_a_row, is_best = rollbacks + 1, 0, False
                    step = held_step = saved.step
                    optimizer.zero_grad()
                    continue
            if math.isfinite(loss) and math.isfinite(gnorm):
                optimizer.step()
                if ema:
                    ema.update()
                bad_in_a_row = 0
            elif overflow:
                log.write("warn", step=step + 1, message="float16 overflow: step skipped, the loss scale is halved")
            else:
                skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
                log.write("warn", step=step + 1, message="loss or gradient is not finite: step skipped")
                say(f"warning: step {step + 1}: loss {loss}, gradient norm {gnorm}: not finite, step skipped")
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            progress.step(step + 1, step_tokens, seconds, loss)
            if step + 1 <= 20 or (step + 1) % args.log_interval == 0 or step + 1 == args.max_steps:
                rate = float(draw.mask.float().mean())
                log.write("train", step=step + 1, loss=runtime.finite(loss), loss_kind=args.loss, mask=rate, lr=lr,
                          gnorm=runtime.finite(gnorm), tok_s=step_tokens / seconds, seq_len=args.seq_len,
                          block=block, first=first, global_batch=rows, tokens_seen=tokens_seen, step_ms=1e3 * seconds,
                          data_ms=data_ms, mem_mb=runtime.peak_memory_mb(device), skipped=skipped, overflows=scaler.overflows)
                if step == first_step or (step + 1) % args.log_interval == 0 or step + 1 == args.max_steps:
                    progress.line(f"step {step + 1}/{args.max_steps} | loss {loss:.4f} | mask {rate:.2f} | lr {lr:.1e} | "
                                  f"gnorm {gnorm:.2f} | tok/s {progress.tok_s:.0f} | ETA {progress.eta}")
            if bad_in_a_row == NON_FINITE_LIMIT:
                cause = guard.likely_cause(model, held[:8], blocks[-1], lambda: runtime.autocast(device, dtype), loss, gnorm,
                                           range(position - NON_FINITE_LIMIT * rows, position), args.lr)
                message = f"{NON_FINITE_LIMIT} steps in a row were not finite, the last is step {step + 1}; likely cause: {cause}"
                log.write("warn", step=step + 1, message=message)
                say(f"error: {message}")
                code = 1
                break
            step += 1

        # ---- the end ----------------------------------------------------------------------------------------------------
        code = code or stop.exit_code
        log.write("end", step=step, code=code, best=None if best == math.inf else best, seconds=progress.elapsed)
        summary = runtime.summary(args, run_dir, params, data, best, progress, tokens_seen, step)
        publish("summary.md", summary)
        log.close()
    say(summary)
    if args.show_samples and code == 0:
        model.eval()
        settings = Settings(max_new_tokens=48, steps=48, mode="block_frozen" if blocks[-1] < args.seq_len else "full",
                            block_size=min(args.block_size, *blocks), temperature=0.5, top_k=50, eos_id=tokenizer.eos_id)
        with averaged():
            for prompt in config.PROMPTS:
                out = generate(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], settings, [args.seed])
                print(f"{prompt}{tokenizer.decode(out.rows[0])}", flush=True)
                print("---")
    return code


if __name__ == "__main__":
    config.run(main)
