/* How the threads of a step share its work. A step has a hundred turns: a product, a norm, the attention of a layer. The work
   of a turn is in pieces, as many in each thread's share. A thread takes those of its own share, one after the other, then
   what is left of others'; when all pieces are done the next turn begins.

   A thread may lose its processor to another program, for milliseconds. What it has not begun is taken by others then. The
   piece that it holds they do too: a product's results are computed beside their place, and whoever is first writes them.
   Who comes back late finds that turns have passed, and joins in where the others are. */

#include "kernels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif !defined(_WIN32)
#include <sched.h>
#endif

#if !defined(LOOKS)
#define LOOKS 2000 /* at the turn, before a thread does a piece that another holds, or sleeps: as long as most pieces take */
#endif

enum { WAIT = 0 | 128, WAKE = 1 | 128 }; /* of linux/futex.h, which is not everywhere: FUTEX_WAIT and FUTEX_WAKE, _PRIVATE */

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
    syscall(SYS_futex, &work->turn, WAIT, now, 0, 0, 0); /* returns at once where it is not */
#elif !defined(_WIN32)
    sched_yield();
#endif
    (void)now;
    __atomic_sub_fetch(&work->asleep, 1, __ATOMIC_SEQ_CST);
}

static void wake_all(uint32_t *turn) {
#if defined(__linux__)
    syscall(SYS_futex, turn, WAKE, INT32_MAX, 0, 0, 0);
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

/* A piece of this turn that another thread holds, whose number goes to `holder`; −1 where there is none. */
static int64_t held_by_another(const Team *team, int *holder) {
    for (int i = 1; i < team->threads; i++) {
        *holder = (team->thread + i) % team->threads;
        uint64_t held = __atomic_load_n(&team->work->shares[*holder].held, __ATOMIC_ACQUIRE);
        if (held > at(team, 0) && held >> 32 == team->turn) return (int64_t)(uint32_t)held - 1;
    }
    return -1;
}

static int is_over(const Team *team) { return __atomic_load_n(&team->work->turn, __ATOMIC_ACQUIRE) != team->turn; }

/* The next piece for this thread, of a turn that has `per` in each share: piece p is of share p / per. It may be one that
   another thread holds, and that both do then. −1 when the turn is over, and whatever was written in it is seen; then this
   thread is in the next. */
int64_t llama_piece(Team *team, int64_t per) {
    if (!per) return -1; /* nothing to do is no turn */
    Work *work = team->work;
    int64_t piece = take(team, per);
    if (piece >= 0) {
        team->holder = team->thread;
        __atomic_store_n(&work->shares[team->thread].held, at(team, piece + 1), __ATOMIC_RELEASE);
    }
    while (piece < 0) {
        for (int i = 0; i < LOOKS && !is_over(team); i++) pause_shortly();
        if (is_over(team)) {
            team->turn++;
            return -1;
        }
        if ((piece = held_by_another(team, &team->holder)) < 0) sleep_during(work, team->turn);
    }
    return piece;
}

/* Whether the piece is this thread's to write: it is for the first that asks, of those that have it. */
int llama_keep(Team *team, int64_t piece) {
    uint64_t held = at(team, piece + 1);
    return __atomic_compare_exchange_n(&team->work->shares[team->holder].held, &held, 0, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
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
