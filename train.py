"""Train a masked-diffusion language model.

    python -m train --preset starter                     # the built-in corpus, minutes on a laptop, ends with samples
    python -m train --data_dir data/processed            # your own text, after python -m prepare
    python -m train --resume checkpoints/eco_hybrid_hi   # continue exactly where a run stopped
    torchrun --nproc_per_node 8 -m train --fsdp          # several GPUs or machines: docs/SCALING.md

Reads from top to bottom: data, model, optimizer, resume, then the loop. Randomness is a function of (seed, step), never of
history, so a resumed run equals the uninterrupted one bit for bit on a CPU, and evaluating more often changes nothing.
"""
import contextlib
import math
import os
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
    """Train with these arguments, as one of the processes that torchrun started or alone; -> exit code."""
    import distributed
    if args.print_config:
        config.announce(args, origins)
    with distributed.joined(args) as ranks:
        run_dir, *more = ranks.tell([str(x) if isinstance(x, Path) else x for x in choose_folder(args, origins)]
                                    if ranks.main else None)
        if run_dir is None:
            say(f"skipped: {args.run_dir} already holds a run and --if_exists skip was given")
            ranks.code = 0
        else:
            ranks.code = (hold_and_train if ranks.main else train)(args, origins, ranks, Path(run_dir), *more)
    return ranks.code


def hold_and_train(args, origins, ranks, run_dir, source, resuming):
    """Train in a run folder that nobody else writes to."""
    import checkpoint
    new = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run_dir} ({error.strerror}): name another --output_dir") from None
    try:
        with checkpoint.run_lock(run_dir):
            return train(args, origins, ranks, run_dir, source, resuming)
    finally:
        if new and run_dir.exists() and not is_used(run_dir):      # it failed before it began: leave no trace
            (run_dir / "LOCK").unlink(missing_ok=True)
            run_dir.rmdir()


def train(args, origins, ranks, run_dir, source, resuming):
    import torch

    import checkpoint
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
        saved = ranks.hear(checkpoint.load(
            source, parts=("model", "ema", "optimizer"),
            quarantine=resuming and checkpoint.candidates(source)[0].parent == run_dir) if ranks.main else None)
    if resuming:
        args, changes = config.resume_check(saved.config, args, origins)
        notes = [f"changed on resume: {c}" for c in changes]
    config.announce(args, origins)
    mine = ranks.share(args.batch_size, args.grad_accum)    # of the sequences of one optimizer step
    with ranks.main_first():
        data_dir = find_data(args, origins)
    args.data_dir = str(data_dir)
    data, val = TokenData(data_dir, "train"), TokenData(data_dir, "val")
    cfg = shapes.model_config(args, data.vocab_size)
    windows = Windows(data, args.seq_len, args.seed)
    tokenizer = Tokenizer(data.tokenizer_path)
    if saved and saved.config["model"]["vocab_size"] != cfg.vocab_size:
        raise UserError(f"{data_dir} has {cfg.vocab_size} pieces, the checkpoint {saved.config['model']['vocab_size']}: "
                        f"prepare the text with --tokenizer {saved.path / 'tokenizer.model'}")
    in_place = resuming and run_dir == saved.path.parent
    if in_place and saved.state["data_sha256"] != data.meta["train_sha256"]:
        raise UserError(f"{data_dir} has changed since this run began (sha256 {data.meta['train_sha256'][:12]}, the checkpoint "
                        f"{saved.state['data_sha256'][:12]}): give the old text, or fork with --run_name NEW")
    first_step = saved.step if resuming else 0
    if first_step >= args.max_steps:
        say(f"nothing to do: step {first_step} of {args.max_steps}")
        return 0

    # ---- model, optimizer, resume ---------------------------------------------------------------------------------------
    dtype, why = runtime.pick_precision(args.amp, args.amp_dtype, device, saved.state["precision"] if resuming else None)
    dtype = {str(d): d for d in (None, torch.bfloat16, torch.float16)}[ranks.tell(str(dtype))]     # rank 0's, if measured
    runtime.seed_everything(args.seed)
    model = build_model(cfg)
    if saved and ranks.main:
        checkpoint.load_into(model, saved.ema if saved.ema and not resuming else saved.model)
    model = ranks.place(model, device, dtype)
    optimizer = optim.make_optimizer(model, args)
    ema = optim.EMA(model, args.ema) if args.ema else None
    best, skipped, position, tokens_seen = math.inf, 0, 0, 0
    if resuming:
        best = saved.state["best"] if in_place and saved.state["best"] is not None else math.inf
        skipped, position, tokens_seen = (saved.state[k] for k in ("skipped", "position", "tokens_seen"))
        if saved.optimizer and not args.reset_optimizer:
            optimizer.load_state_tensors(ranks.cut(saved.optimizer, model))
        else:
            notes.append("the optimizer starts fresh")
        if ema and saved.ema:
            ema.load(ranks.cut(saved.ema, model), saved.state["ema_updates"])
    rows = args.batch_size * args.grad_accum                # sequences of one optimizer step
    step_tokens = rows * args.seq_len
    params = shapes.count_params(cfg)
    say(f"model: {args.model}, {params:,} parameters, d_ff {args.d_ff}; device {device}, {torch.get_num_threads()} threads"
        f"{f', {ranks.world} processes' if ranks.world > 1 else ''}{', sharded' if args.fsdp else ''}; "
        f"precision {why}; memory: {allocator}")
    say(f"data: {data_dir} ({data.meta['source']}), {data.meta['train_tokens']:,} tokens, {cfg.vocab_size} pieces; "
        f"{args.max_steps} steps of {rows} x {args.seq_len} = {args.max_steps * step_tokens / 1e6:.1f}M tokens, "
        f"{args.max_steps * step_tokens / data.meta['train_tokens']:.2f} epochs; run folder {run_dir}")
    held = val.val_windows(args.eval_batches * args.batch_size, args.seq_len).to(device)
    if ranks.main and not in_place and is_used(run_dir):    # last: whatever can be wrong with the arguments is behind us
        archive(run_dir)
    if args.compile:
        with runtime.autocast(device, dtype):
            compile_step(model, args, (args.batch_size, args.seq_len), device)
    blocks = sorted(set(args.block_choices), reverse=True)
    saved_args = {"args": config.to_dict(args, config.TrainArgs), "model": cfg.to_dict()}

    def averaged():
        return ema.swap() if ema else contextlib.nullcontext()

    def evaluate(step):
        model.eval()
        with torch.no_grad(), runtime.autocast(device, dtype), averaged():
            score = held_out(model, held, blocks, 0, args.batch_size, 1)
        ranks.fold(model)
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
        parts = [ranks.whole(part) for part in (model.state_dict(), ema.state() if ema else None, optimizer.state_tensors())]
        return ranks.tell(ranks.main and write(step, is_best, *parts))

    def write(step, is_best, model_state, ema_state, optimizer_state):
        state = {"tokens_seen": tokens_seen, "position": position, "skipped": skipped, "best": None if best == math.inf else best,
                 "ema_updates": ema.updates if ema else 0, "model": args.model,
                 "data_sha256": data.meta["train_sha256"], "source": data.meta["source"],
                 "environment": runtime.environment(device), "compiled": args.compile, "precision": str(dtype)}
        started = time.perf_counter()
        try:
            folder = checkpoint.save(
                run_dir, step, model_state=model_state, ema_state=ema_state, optimizer_state=optimizer_state,
                state=state, config=saved_args,
                tokenizer_bytes=tokenizer.model_bytes, best=is_best,
                keep_last=args.keep_last if args.save_interval else 1, keep_full=args.keep_full)
        except OSError as error:                         # disk full: what was saved before is intact, so training goes on
            log.write("warn", step=step, message=f"save failed: {error}")
            say(f"warning: step {step} could not be saved: {error}; the checkpoints before it are intact")
            return False
        log.write("save", step=step, folder=folder.name, seconds=round(time.perf_counter() - started, 3), best=is_best)
        return True

    # ---- the loop: evaluate, save, stop, step, log; one turn more than steps --------------------------------------------
    with runtime.StopFlag() as stop, runtime.Progress(args, first_step) as progress:
        log = runtime.JsonLines(run_dir / "train.jsonl" if ranks.main else os.devnull)
        log.write("meta", time=time.strftime("%Y-%m-%dT%H:%M:%S"), version=1, argv=sys.argv,
                  config=saved_args, params_total=params, params_blocks=shapes.block_params(cfg),
                  data={"source": data.meta["source"], "tokens": data.meta["train_tokens"], "sha256": data.meta["train_sha256"]},
                  planned_tokens=args.max_steps * step_tokens, precision=why, allocator=allocator, **runtime.environment(device))
        if resuming:
            log.write("resume", step=first_step, checkpoint=str(saved.path), notes=notes)
        for note in notes:
            say(f"notice: {note}")
        if ranks.main:
            (run_dir / "config.json").write_text(checkpoint.to_json(saved_args).decode(), encoding="utf-8")
        bad_in_a_row, unsaved, is_best, code = 0, 0, False, 0
        for step in range(first_step, args.max_steps + 1):
            last = step == args.max_steps
            turn = step > first_step or not resuming              # a resume does not repeat what its checkpoint already holds
            if turn and args.eval_interval and (last or step % args.eval_interval == 0):
                nats = evaluate(step)
                is_best = is_best or nats < best
                best = min(best, nats)
            every = args.save_interval or 500
            signal = ranks.highest(stop.signal)                   # one rank's is everybody's
            if turn and step and (last or signal is not None or step % every == 0):
                unsaved = 0 if save(step, is_best) else unsaved + 1
                is_best = is_best and unsaved > 0
            if unsaved == SAVE_LIMIT or unsaved and (last or signal is not None):
                code = 1
                break
            if last or signal is not None:
                break

            started = time.perf_counter()
            model.train()
            lr = optim.lr_at(step, args.max_steps, args.lr, args.warmup, args.lr_schedule, args.min_lr_ratio)
            optimizer.set_lr(lr)
            torch.manual_seed(masking.step_generator(args.seed, step, "drop").initial_seed() + ranks.rank)    # dropout
            block, first = masking.pick_blocks(args.block_choices, args.seq_len, args.seed, step)
            draw = masking.draw(args, args.seed, step, rows, args.seq_len, block, first, mine)
            total = masking.normaliser(args.loss, draw)
            early = masking.pick_exit(args.n_layers, args.seed, step) if cfg.exits and args.n_layers > 1 else None
            x0 = windows.batch(position + mine.start, mine.stop - mine.start).to(device)      # (rows of this rank, T)
            data_ms = 1e3 * (time.perf_counter() - started)
            loss = 0.0
            for a in range(0, len(x0), args.batch_size):
                part = slice(a, a + args.batch_size)
                with runtime.autocast(device, dtype):
                    out = masking.denoising_loss(model, x0[part], draw, args.loss, total, part, early=early,
                                                 early_weight=args.exit_loss_weight)
                out.loss.backward()
                loss += float(out.loss.detach())
            ranks.sum_gradients(model)
            loss = ranks.total(loss)
            gnorm = float(optim.clip_grad_norm(model, args.grad_clip))
            if math.isfinite(loss) and math.isfinite(gnorm):
                optimizer.step()
                if ema:
                    ema.update()
                bad_in_a_row = 0
            else:
                skipped, bad_in_a_row = skipped + 1, bad_in_a_row + 1
                log.write("warn", step=step + 1, message="loss or gradient is not finite: step skipped")
                say(f"warning: step {step + 1}: loss {loss}, gradient norm {gnorm}: not finite, step skipped")
            optimizer.zero_grad()
            position, tokens_seen = position + rows, tokens_seen + step_tokens
            seconds = time.perf_counter() - started
            progress.step(step + 1, step_tokens, seconds, loss)
            if step + 1 <= 20 or (step + 1) % args.log_interval == 0 or step + 1 == args.max_steps:
                rate = draw.hidden / step_tokens
                log.write("train", step=step + 1, loss=runtime.finite(loss), loss_kind=args.loss, mask=rate, lr=lr,
                          gnorm=runtime.finite(gnorm), tok_s=step_tokens / seconds, seq_len=args.seq_len,
                          block=block, first=first, global_batch=rows, tokens_seen=tokens_seen, step_ms=1e3 * seconds,
                          data_ms=data_ms, mem_mb=runtime.peak_memory_mb(device), skipped=skipped)
                if step == first_step or (step + 1) % args.log_interval == 0 or step + 1 == args.max_steps:
                    progress.line(f"step {step + 1}/{args.max_steps} | loss {loss:.4f} | mask {rate:.2f} | lr {lr:.1e} | "
                                  f"gnorm {gnorm:.2f} | tok/s {progress.tok_s:.0f} | ETA {progress.eta}")
            if bad_in_a_row == NON_FINITE_LIMIT:
                say(f"error: {NON_FINITE_LIMIT} steps in a row were not finite, the last is step {step + 1}: "
                    f"try --lr {args.lr / 2:.1e}")
                code = 1
                break

        # ---- the end ----------------------------------------------------------------------------------------------------
        stop.signal = ranks.highest(stop.signal)
        code = code or stop.exit_code
        log.write("end", step=step, code=code, best=None if best == math.inf else best, seconds=progress.elapsed)
        summary = runtime.summary(args, run_dir, params, data, best, progress, tokens_seen, step)
        if ranks.main:
            (run_dir / "summary.md").write_text(summary, encoding="utf-8")
        log.close()
    say(summary)
    if args.show_samples and code == 0 and ranks.main and not args.fsdp:        # a sharded model cannot speak by itself
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
