/* Where the threads of a step meet. A step is a hundred pieces of work, each of which some threads share and the next of
   which begins when all are done. OpenMP's barriers wait as its environment says, by itself for milliseconds: where a
   thread waits for one that has no processor, because another program has it, that keeps the processor from both. */

#include "kernels.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif !defined(_WIN32)
#include <sched.h>
#endif

enum { LOOKS = 2000 }; /* before a thread sleeps: far longer than shares of work differ, far shorter than a turn of a processor */

INLINE void pause_shortly(void) {
#if X86
    _mm_pause();
#elif ARM
    __asm__ volatile("isb");
#endif
}

/* Until `turn` is no longer `now`, or somebody wakes this thread. */
static void sleep_during(uint32_t *turn, uint32_t now) {
#if defined(__linux__)
    syscall(SYS_futex, turn, FUTEX_WAIT_PRIVATE, now, 0, 0, 0);
#elif !defined(_WIN32)
    (void)turn, (void)now;
    sched_yield();
#endif
}

static void wake_all(uint32_t *turn) {
#if defined(__linux__)
    syscall(SYS_futex, turn, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
#endif
    (void)turn;
}

/* Return when all threads of the team have called this: then they see whatever any of them wrote before. */
void llama_meet(Team team) {
    Meeting *m = team.meeting;
    uint32_t now = __atomic_load_n(&m->turn, __ATOMIC_RELAXED); /* it cannot be over before this thread is here */
    if (__atomic_add_fetch(&m->arrived, 1, __ATOMIC_ACQ_REL) == team.threads) {
        m->arrived = 0;
        m->claimed = 0;
        __atomic_store_n(&m->turn, now + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&m->asleep, __ATOMIC_SEQ_CST)) wake_all(&m->turn);
        return;
    }
    for (int i = 0; i < LOOKS; i++) {
        if (__atomic_load_n(&m->turn, __ATOMIC_ACQUIRE) != now) return;
        pause_shortly();
    }
    __atomic_add_fetch(&m->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&m->turn, __ATOMIC_SEQ_CST) == now) sleep_during(&m->turn, now);
    __atomic_sub_fetch(&m->asleep, 1, __ATOMIC_SEQ_CST);
}
