/* HEAD */
#pragma once
#include "common.h"
#include <sys/mman.h>

#define LARGE_PAGE (1 << 21)

/* Room of a thread's own, in large pages where it fills one, of which parts are taken one after the other; each begins at a line of the cache. */
typedef struct { char *at; long size, taken; } scratch_arena;

static inline void *take(scratch_arena *room, long bytes) {
    void *at = room->at + room->taken;
    room->taken += (bytes + 63) / 64 * 64;
    return at;
}

static inline void reserve(scratch_arena *room, long bytes) {
    if (bytes > room->size) {
        long page = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
        free(room->at);
        room->size = (bytes + page - 1) / page * page;
        room->at = aligned_alloc(page, room->size);
        if (page == LARGE_PAGE) madvise(room->at, room->size, MADV_HUGEPAGE);
    }
    room->taken = 0;
}
