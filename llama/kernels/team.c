/* How the threads of a step share its work. A step has a hundred turns: a product, a norm, the attention of a layer. The work
   of a turn is in pieces, as many in each thread's share. A thread takes those of its own share, one after the other, then
   what is left of others'; when all pieces are done the next turn begins.

   A thread may lose its processor to another program, for milliseconds. What it has not begun is taken by others then. So is
   the piece that it holds: a product's results are computed beside their place, and only who still holds the piece writes
   them. Who comes back late finds that turns have passed, and joins in where the others are. */

#include "kernels.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif !defined(_WIN32)
#include <sched.h>
#endif

#if !defined(LOOKS)
#define LOOKS 2000 /* before a thread takes others' pieces from them, or sleeps: longer than the time of a piece */
#endif

INLINE void pause_shortly(void) {
#if X86
    _mm_pause();
#elif ARM
    __asm__ volatile("isb");
#endif
}

/* Until the turn is no longer `now`, as a rule. */
static void sleep_during(Work *work, uint32_t now) {
    __atomic_add_fetch(&work->asleep, 1, __ATOMIC_SEQ_CST);
#if defined(__linux__)
    syscall(SYS_futex, &work->turn, FUTEX_WAIT_PRIVATE, now, 0, 0, 0); /* returns at once where it is not */
#elif !defined(_WIN32)
    sched_yield();
#endif
    (void)now;
    __atomic_sub_fetch(&work->asleep, 1, __ATOMIC_SEQ_CST);
}

static void wake_all(uint32_t *turn) {
#if defined(__linux__)
    syscall(SYS_futex, turn, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
#endif
    (void)turn;
}

static uint64_t at(const Team *team, int64_t number) { return (uint64_t)team->turn << 32 | (uint64_t)number; }

/* A piece that nobody has taken, of this thread's share or of another; −1 where there is none. */
static int64_t take(const Team *team, int64_t per) {
    for (int i = 0; i < team->threads; i++) {
        int64_t share = (team->thread + i) % team->threads;
        uint64_t *taken = &team->work->shares[share].taken, seen = __atomic_load_n(taken, __ATOMIC_ACQUIRE);
        while (seen < at(team, per)) /* those of a later turn are more */
            if (__atomic_compare_exchange_n(taken, &seen, seen + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
                return share * per + (int64_t)(uint32_t)seen;
    }
    return -1;
}

/* A piece of this turn that another thread holds, which no longer does then; −1 where there is none. */
static int64_t take_away(const Team *team) {
    for (int i = 1; i < team->threads; i++) {
        uint64_t *held = &team->work->shares[(team->thread + i) % team->threads].held;
        uint64_t seen = __atomic_load_n(held, __ATOMIC_ACQUIRE);
        if (seen > at(team, 0) && seen >> 32 == team->turn)
            if (__atomic_compare_exchange_n(held, &seen, 0, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
                return (int64_t)(uint32_t)seen - 1;
    }
    return -1;
}

static int is_over(const Team *team) { return __atomic_load_n(&team->work->turn, __ATOMIC_ACQUIRE) != team->turn; }

/* The next piece for this thread, which holds it then, of a turn that has `per` in each share: piece p is of share p / per.
   −1 when the turn is over, and whatever was written in it is seen. Then this thread is in the next. */
int64_t llama_piece(Team *team, int64_t per) {
    if (!per) return -1; /* nothing to do is no turn */
    Work *work = team->work;
    int64_t piece = take(team, per);
    while (piece < 0) {
        for (int i = 0; i < LOOKS && !is_over(team); i++) pause_shortly();
        if (is_over(team)) {
            team->turn++;
            return -1;
        }
        if ((piece = take_away(team)) < 0) sleep_during(work, team->turn);
    }
    __atomic_store_n(&work->shares[team->thread].held, at(team, piece + 1), __ATOMIC_RELEASE);
    return piece;
}

/* Whether this thread still holds the piece. From now on nobody takes it away. */
int llama_keep(Team *team, int64_t piece) {
    uint64_t own = at(team, piece + 1);
    return __atomic_compare_exchange_n(&team->work->shares[team->thread].held, &own, 0, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* A piece that was kept is done. The last one of a turn begins the next. */
void llama_done(Team *team, int64_t per) {
    Work *work = team->work;
    if (__atomic_add_fetch(&work->done, 1, __ATOMIC_ACQ_REL) < per * team->threads) return;
    work->done = 0;
    for (int i = 0; i < team->threads; i++)
        __atomic_store_n(&work->shares[i].taken, (uint64_t)(team->turn + 1) << 32, __ATOMIC_RELEASE);
    __atomic_store_n(&work->turn, team->turn + 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&work->asleep, __ATOMIC_SEQ_CST)) wake_all(&work->turn);
}
