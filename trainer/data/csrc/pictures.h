/* Which pictures a video stream shows, found in its packets without decoding them, and from which
 * packet on each must be decoded. */
#include <libavcodec/avcodec.h>
#include <stdlib.h>
#include <string.h>

struct unit {
    AVPacket *pkt;
    int key;
};

struct picture {
    int64_t pts;
    int packet; /* sending up to this one completes the picture */
    int start;  /* the keyframe packet to start from */
};

/* The packets of a stream in file order and what they show. */
struct pictures {
    struct unit *units;
    struct picture *pics; /* in presentation order */
    int64_t num_units, cap_units, num_pics, cap_pics;
};

static void *grow(void *array, int64_t count, int64_t *cap, size_t size) {
    if (count < *cap) return array;
    int64_t bigger = *cap ? *cap * 2 : 256;
    void *moved = av_realloc(array, bigger * size);
    if (!moved) abort(); /* as Rust does when memory runs out */
    *cap = bigger;
    return moved;
}

static void add_picture(struct pictures *all, int64_t pts, int packet, int start) {
    all->pics = grow(all->pics, all->num_pics, &all->cap_pics, sizeof *all->pics);
    all->pics[all->num_pics++] = (struct picture){pts, packet, start};
}

struct bits {
    const uint8_t *at, *end;
    int bit;
};

static unsigned get(struct bits *b, int n) {
    unsigned value = 0;
    while (n--) {
        unsigned one = b->at < b->end ? (*b->at >> (7 - b->bit)) & 1 : 0;
        value = value << 1 | one;
        if (++b->bit == 8) b->bit = 0, b->at++;
    }
    return value;
}

/* VP8 (RFC 6386, 9.1) and VP9 (bitstream specification, 6.2 and annex B) may send pictures that
 * are only references. A VP9 superframe always ends in a shown one. */
static int is_shown(enum AVCodecID codec, const AVPacket *p) {
    if (p->size < 1 || (p->flags & AV_PKT_FLAG_DISCARD)) return 0;
    if (codec == AV_CODEC_ID_VP8) return p->data[0] >> 4 & 1;
    if (codec != AV_CODEC_ID_VP9 || (p->data[p->size - 1] & 0xe0) == 0xc0) return 1;
    struct bits b = {p->data, p->data + p->size, 2};
    unsigned profile = get(&b, 1);
    profile |= get(&b, 1) << 1;
    if (profile == 3) get(&b, 1);
    if (get(&b, 1)) return 1; /* show_existing_frame */
    get(&b, 1);               /* frame_type */
    return get(&b, 1);        /* show_frame */
}

/* Bits of vop_time_increment, from a VOL header (ISO/IEC 14496-2, 6.2.3). */
static int vol_time_bits(const uint8_t *at, const uint8_t *end) {
    struct bits b = {at, end, 0};
    get(&b, 9);
    if (get(&b, 1)) get(&b, 7);
    if (get(&b, 4) == 15) get(&b, 16);
    if (get(&b, 1)) {
        get(&b, 3);
        if (get(&b, 1)) get(&b, 79 - 32), get(&b, 32);
    }
    get(&b, 3);
    unsigned resolution = get(&b, 16);
    int n = 1;
    while (resolution > 1u << n) n++;
    return n;
}

struct mpeg4 {
    int time_bits, refs;
    int pending, pending_start; /* the reference picture not shown yet; -1: none */
    int shown_start;            /* where decoding starts for the reference before it */
    int start;                  /* packet of the last I picture; -1: none */
    int backlog;                /* pictures received and not decoded yet */
};

/* Finds the pictures of one packet and appends them to the presentation order: a B picture is
 * shown at once, a reference when the next one comes. The decoder takes one picture per packet: of
 * a packed packet, which holds a P and a B, the B waits for the next packet, in the end for a
 * placeholder (vop_coded 0), which shows nothing itself. */
static void scan_mpeg4(struct pictures *all, struct mpeg4 *m, int packet, const uint8_t *data, int size) {
    const uint8_t *end = data + size, *at = data;
    int nth = 0;
    while ((at = end - at >= 5 ? memchr(at + 2, 1, end - at - 4) : NULL)) {
        at -= 2;
        if (at[0] || at[1]) {
            at++;
            continue;
        }
        unsigned code = at[3];
        at += 4;
        if (code >= 0x20 && code <= 0x2f) m->time_bits = vol_time_bits(at, end);
        if (code != 0xb6 || packet < 0) continue;
        struct bits b = {at, end, 0};
        unsigned type = get(&b, 2);
        while (get(&b, 1)) continue;
        get(&b, 1 + m->time_bits + 1);
        if (!get(&b, 1)) continue;
        int done = packet + m->backlog + nth++;
        if (type == 0 && nth == 1) {
            m->start = packet;
            all->units[packet].key = 1;
        }
        if (m->start < 0) continue;
        if (type == 2) {
            /* The decoder drops a B picture that has lost one of its two references. */
            if (m->refs >= 2) add_picture(all, AV_NOPTS_VALUE, done, m->shown_start);
            continue;
        }
        if (m->pending >= 0) add_picture(all, AV_NOPTS_VALUE, m->pending, m->pending_start);
        m->pending = done;
        m->shown_start = m->pending_start;
        m->pending_start = m->start;
        m->refs++;
    }
    m->backlog += nth - 1;
    if (m->backlog < 0) m->backlog = 0;
}

static int by_pts(const void *a, const void *b) {
    int64_t x = ((const struct picture *)a)->pts, y = ((const struct picture *)b)->pts;
    return (x > y) - (x < y);
}

/* The pictures by their timestamps; 0 where these are missing or repeat, or nothing is a keyframe. */
static int list_by_pts(struct pictures *all, const AVCodecParameters *par) {
    int first = 0;
    while (first < all->num_units && !all->units[first].key) first++;
    for (int i = first; i < all->num_units; i++) {
        const AVPacket *p = all->units[i].pkt;
        if (!is_shown(par->codec_id, p)) continue;
        if (p->pts == AV_NOPTS_VALUE) return 0;
        int start = i; /* in an open GOP, pictures shown before the keyframe need the one before it */
        while (start > first && !(all->units[start].key && all->units[start].pkt->pts <= p->pts)) start--;
        add_picture(all, p->pts, i, start);
    }
    qsort(all->pics, all->num_pics, sizeof *all->pics, by_pts);
    for (int64_t k = 1; k < all->num_pics; k++)
        if (all->pics[k].pts == all->pics[k - 1].pts) return 0;
    return all->num_pics > 0;
}

static int list_by_vop(struct pictures *all, const AVCodecParameters *par) {
    struct mpeg4 m = {.pending = -1, .pending_start = -1, .shown_start = -1, .start = -1};
    scan_mpeg4(all, &m, -1, par->extradata, par->extradata_size);
    for (int i = 0; i < all->num_units; i++) scan_mpeg4(all, &m, i, all->units[i].pkt->data, all->units[i].pkt->size);
    if (m.pending >= 0) add_picture(all, AV_NOPTS_VALUE, m.pending, m.pending_start);
    /* A picture that waits when the file ends is never decoded. */
    int64_t kept = 0;
    for (int64_t k = 0; k < all->num_pics; k++)
        if (all->pics[k].packet < all->num_units) all->pics[kept++] = all->pics[k];
    all->num_pics = kept;
    /* Counting from a keyframe needs every picture shown before the wanted one decoded, too. */
    for (int64_t k = 1; k < all->num_pics; k++) {
        struct picture *p = &all->pics[k];
        if (p->start == p[-1].start && p->packet < p[-1].packet) p->packet = p[-1].packet;
    }
    return all->num_pics > 0;
}
