/* Makes a process believe that this CPU is an older one: libraries ask it with the instruction
 * cpuid, which traps here, and is answered without what the older one lacks. They then take the
 * code that they would take there, at this CPU's speed. Linux on x86-64, in a process whose
 * OLDER_CPU names a kind and whose LD_PRELOAD names this library (older_cpu.py).
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

static const char *kind;

static int is(const char *name) {
  return !strcmp(kind, name);
}

/* May cpuid be asked? Of this thread, and of those that it starts. */
static int allow_cpuid(int allowed) {
  return syscall(SYS_arch_prctl, ARCH_SET_CPUID, (unsigned long)allowed);
}

/* What leaf 1 and the two leaves 7 say of vectors, without what the kind lacks. */
static void forget(unsigned leaf, unsigned part,
                   unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
  const unsigned avx512_b = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30)
                            | BIT(31);
  const unsigned avx512_newer = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);   /* VNNI is 11 */
  const unsigned amx_and_fp16 = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
  if (leaf == 1 && is("sse")) *c &= ~(BIT(12) | BIT(28) | BIT(29));    /* FMA, AVX, F16C */
  if (leaf == 7 && part == 0) {
    *d &= ~amx_and_fp16;
    *c &= ~avx512_newer;
    if (!is("avx512")) *b &= ~avx512_b;
    if (is("sse")) *b &= ~BIT(5);                                                /* AVX2 */
  }
  if (leaf == 7 && part == 1) {
    *a &= ~(BIT(5) | BIT(21));                                                   /* bf16, AMX */
    if (!is("avx-vnni")) *a &= ~BIT(4);
    *d &= ~(BIT(4) | BIT(5) | BIT(10));
  }
}

static void on_trap(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) {     /* no cpuid: a fault like any other */
    signal(number, SIG_DFL);
    return;
  }
  unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
  allow_cpuid(1);
  __cpuid_count(leaf, part, a, b, c, d);
  allow_cpuid(0);
  forget(leaf, part, &a, &b, &c, &d);
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
  kind = getenv("OLDER_CPU");
  if (!kind) return;
  if (!strncmp(program_invocation_short_name, "cc1", 3)) return;    /* gcc has its own handler */
  struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, NULL);
  if (allow_cpuid(0)) {
    fputs("this CPU does not let cpuid trap\n", stderr);
    _exit(3);
  }
}
