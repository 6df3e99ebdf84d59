/* Exact frames of a video by index, through FFmpeg 4.4 to 7. Built as a shared object of its own,
 * so that a program that never opens a video needs no FFmpeg.
 *
 * Opening demuxes the whole video stream once and keeps its compressed packets. That gives the
 * number of frames and, for each, the packet that completes it and the keyframe decoding must
 * start from; decoding then jumps between packets in memory and never seeks in the file. */
#include "pictures.h"

#include <libavformat/avformat.h>
#include <libswscale/swscale.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
/* A training clip is a few MiB; past this the file was meant to be cut first. */
#define MAX_BYTES ((int64_t)2 << 30)
/* Exact rounding and interpolated chroma, so that all machines train on the same bytes. */
#define SWS_FLAGS (SWS_BILINEAR | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_BITEXACT)

enum { BROKEN = -1, UNSUPPORTED = -2, DAMAGED = -3 };

/* How decoded pictures are recognised: by the timestamp their packet carried, by counting MPEG-4
 * pictures found in the packets, or by counting what comes out of a decode from the start. */
enum by { BY_PTS, BY_VOP, BY_OUTPUT };

struct tsm_info {
    int32_t width, height;
    int64_t frames;  /* as the file promises them */
    int64_t present; /* less than `frames` where the file ends early */
    char codec[32];
};

struct conversion {
    int from_width, from_height, format, width, height, matrix, full;
};

struct tsm_decoder {
    AVFormatContext *ic;
    AVCodecContext *cx;
    struct SwsContext *sws;
    struct conversion conversion; /* what `sws` was made for */
    AVFrame *frame;
    AVStream *st;
    struct pictures all;
    enum by by;
    int width, height;
    char error[512];
};

static _Thread_local char last_log[256];

static void keep_log(void *who, int level, const char *format, va_list args) {
    (void)who;
    if (level > AV_LOG_ERROR) return;
    vsnprintf(last_log, sizeof last_log, format, args);
    last_log[strcspn(last_log, "\n")] = 0;
}

static int fail(struct tsm_decoder *d, int code, const char *what, int av) {
    char text[128] = "";
    if (av < 0) av_strerror(av, text, sizeof text);
    snprintf(d->error, sizeof d->error, "%s%s%s%s%s%s", what, av < 0 ? ": " : "", text, last_log[0] ? " (" : "",
             last_log, last_log[0] ? ")" : "");
    return code;
}

/* --- opening --- */

EXPORT struct tsm_decoder *tsm_decoder_new(void) {
    struct tsm_decoder *d = calloc(1, sizeof *d);
    if (d && !(d->frame = av_frame_alloc())) free(d), d = NULL;
    av_log_set_callback(keep_log);
    return d;
}

EXPORT void tsm_close(struct tsm_decoder *d) {
    for (int i = 0; i < d->all.num_units; i++) av_packet_free(&d->all.units[i].pkt);
    d->all.num_units = 0;
    d->all.num_pics = 0;
    avcodec_free_context(&d->cx);
    avformat_close_input(&d->ic);
}

EXPORT void tsm_decoder_free(struct tsm_decoder *d) {
    tsm_close(d);
    sws_freeContext(d->sws);
    av_frame_free(&d->frame);
    av_free(d->all.units);
    av_free(d->all.pics);
    free(d);
}

EXPORT const char *tsm_error(const struct tsm_decoder *d) { return d->error; }

/* Reads every packet of the stream. Returns 1 when the file ends early, 0 otherwise. */
static int read_packets(struct tsm_decoder *d, int64_t *bytes) {
    int cut = 0, ret;
    *bytes = 0;
    for (;;) {
        AVPacket *p = av_packet_alloc();
        if (!p) abort();
        ret = av_read_frame(d->ic, p);
        cut |= ret >= 0 && p->stream_index == d->st->index && (p->flags & AV_PKT_FLAG_CORRUPT);
        if (ret < 0 || p->stream_index != d->st->index || (p->flags & AV_PKT_FLAG_CORRUPT)) {
            av_packet_free(&p);
            if (ret < 0) break;
            continue;
        }
        d->all.units = grow(d->all.units, d->all.num_units, &d->all.cap_units, sizeof *d->all.units);
        d->all.units[d->all.num_units++] = (struct unit){p, p->flags & AV_PKT_FLAG_KEY ? 1 : 0};
        if ((*bytes += p->size) > MAX_BYTES) break;
    }
    /* Matroska's demuxer takes a missing end for the end and only logs it. */
    return cut || (ret < 0 && ret != AVERROR_EOF) || strstr(last_log, "ended prematurely");
}

static int open_codec(struct tsm_decoder *d) {
    const AVCodec *codec = avcodec_find_decoder(d->st->codecpar->codec_id);
    if (!codec) return fail(d, UNSUPPORTED, "this FFmpeg has no decoder for the codec", 0);
    if (!(d->cx = avcodec_alloc_context3(codec))) abort();
    int ret = avcodec_parameters_to_context(d->cx, d->st->codecpar);
    d->cx->pkt_timebase = d->st->time_base;
    d->cx->thread_count = 1; /* the loader runs one decoder per core */
    /* Without this a stream that does not state its reorder depth loses pictures while the decoder
     * is still guessing it. */
    if (codec->id == AV_CODEC_ID_H264) d->cx->strict_std_compliance = FF_COMPLIANCE_STRICT;
    if (ret >= 0) ret = avcodec_open2(d->cx, codec, NULL);
    return ret < 0 ? fail(d, BROKEN, "cannot open the decoder", ret) : 0;
}

static int decode(struct tsm_decoder *, int, int, const int64_t *, uint8_t *const *, size_t, enum by, int64_t, int64_t *);

/* Opens `path` in place of the video open before. */
EXPORT int tsm_open(struct tsm_decoder *d, const char *path, struct tsm_info *info) {
    tsm_close(d);
    last_log[0] = 0;
    int ret = avformat_open_input(&d->ic, path, NULL, NULL);
    if (ret < 0) return fail(d, BROKEN, "not a video FFmpeg can read", ret);
    const char *format = d->ic->iformat->name;
    int st = av_find_best_stream(d->ic, AVMEDIA_TYPE_VIDEO, -1, -1, NULL, 0);
    /* MP4 and Matroska state all that is needed in their headers, and MPEG-4 pictures are counted
     * by their own; probing would decode the first frames for nothing. */
    int stated = st >= 0 && d->ic->streams[st]->codecpar->width > 0 &&
                 (strstr(format, "mp4") || strstr(format, "matroska") ||
                  d->ic->streams[st]->codecpar->codec_id == AV_CODEC_ID_MPEG4);
    if (!stated) {
        if ((ret = avformat_find_stream_info(d->ic, NULL)) < 0) return fail(d, BROKEN, "cannot read the streams", ret);
        st = av_find_best_stream(d->ic, AVMEDIA_TYPE_VIDEO, -1, -1, NULL, 0);
    }
    if (st < 0) return fail(d, BROKEN, "no video stream", 0);
    d->st = d->ic->streams[st];
    for (unsigned i = 0; i < d->ic->nb_streams; i++)
        if ((int)i != st) d->ic->streams[i]->discard = AVDISCARD_ALL;
    d->width = d->st->codecpar->width;
    d->height = d->st->codecpar->height;
    if (d->width <= 0 || d->height <= 0) return fail(d, BROKEN, "the video stream states no picture size", 0);
    if ((ret = open_codec(d)) < 0) return ret;
    int64_t bytes;
    int cut = read_packets(d, &bytes);
    if (bytes > MAX_BYTES) return fail(d, UNSUPPORTED, "more than 2 GiB of video; cut it into clips", 0);
    if (strstr(format, "avi") && d->ic->pb && avio_seek(d->ic->pb, 4, SEEK_SET) == 4)
        cut |= avio_size(d->ic->pb) < 8 + (int64_t)avio_rl32(d->ic->pb); /* the RIFF header's own size */
    int64_t promised = cut && strstr(format, "avi") ? d->st->nb_frames : 0;
#if LIBAVFORMAT_VERSION_MAJOR >= 59
    if (strstr(format, "mp4")) promised = avformat_index_get_entries_count(d->st);
#endif
    if (cut && !promised && d->all.num_units > 1 && d->ic->duration > 0) {
        int64_t span = d->all.units[d->all.num_units - 1].pkt->pts - d->all.units[0].pkt->pts;
        span = av_rescale_q(span, d->st->time_base, AV_TIME_BASE_Q);
        if (span > 0) promised = av_rescale(d->all.num_units - 1, d->ic->duration, span);
    }
    int mpeg4 = d->st->codecpar->codec_id == AV_CODEC_ID_MPEG4;
    d->by = mpeg4 ? BY_VOP : BY_PTS;
    if (!(mpeg4 ? list_by_vop(&d->all, d->st->codecpar) : list_by_pts(&d->all, d->st->codecpar))) {
        d->all.num_pics = 0;
        d->by = BY_OUTPUT;
        int64_t count = 0;
        if ((ret = decode(d, 0, d->all.num_units - 1, NULL, NULL, 0, BY_OUTPUT, 0, &count)) < 0) return ret;
        for (int64_t k = 0; k < count; k++) add_picture(&d->all, AV_NOPTS_VALUE, d->all.num_units - 1, 0);
    }
    info->width = d->width;
    info->height = d->height;
    info->present = d->all.num_pics;
    info->frames = d->all.num_pics + (promised > d->all.num_units ? promised - d->all.num_units : 0);
    snprintf(info->codec, sizeof info->codec, "%s", avcodec_get_name(d->st->codecpar->codec_id));
    if (d->all.num_pics == 0) return fail(d, BROKEN, "the video stream holds no frame", 0);
    return 0;
}

/* --- decoding --- */

static int convert(struct tsm_decoder *d, uint8_t *rgb) {
    const AVFrame *f = d->frame;
    /* AVColorSpace and SWS_CS_* share their numbers; a file that says nothing means BT.601. */
    struct conversion c = {f->width, f->height, f->format, d->width, d->height,
                           f->colorspace == AVCOL_SPC_UNSPECIFIED ? SWS_CS_DEFAULT : (int)f->colorspace,
                           f->color_range == AVCOL_RANGE_JPEG};
    if (!d->sws || memcmp(&c, &d->conversion, sizeof c)) {
        sws_freeContext(d->sws);
        d->sws = sws_getContext(f->width, f->height, f->format, d->width, d->height, AV_PIX_FMT_RGB24, SWS_FLAGS,
                                NULL, NULL, NULL);
        if (!d->sws) return fail(d, UNSUPPORTED, "no conversion to RGB from the pixel format", 0);
        sws_setColorspaceDetails(d->sws, sws_getCoefficients(c.matrix), c.full, sws_getCoefficients(SWS_CS_DEFAULT), 1,
                                 0, 1 << 16, 1 << 16);
        d->conversion = c;
    }
    uint8_t *planes[4] = {rgb};
    int strides[4] = {3 * d->width};
    int rows = sws_scale(d->sws, (const uint8_t *const *)f->data, f->linesize, 0, f->height, planes, strides);
    return rows == d->height ? 0 : fail(d, BROKEN, "conversion to RGB failed", 0);
}

static int find(const struct tsm_decoder *d, const int64_t *index, size_t n, int64_t pts) {
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (d->all.pics[index[middle]].pts < pts) low = middle + 1;
        else high = middle;
    }
    return low < n && d->all.pics[index[low]].pts == pts ? (int)low : -1;
}

/* Decodes packets `start..=end` and writes the frames of `index` (ascending) to `rgb`. Outputs are
 * numbered from `first` where they are counted; `total` is how many came out. Returns how many
 * of the wanted were written. */
static int decode(struct tsm_decoder *d, int start, int end, const int64_t *index, uint8_t *const *rgb, size_t n,
                  enum by by, int64_t first, int64_t *total) {
    int got = 0, damage = 0, ret;
    *total = 0;
    last_log[0] = 0;
    avcodec_flush_buffers(d->cx);
    d->cx->skip_frame = AVDISCARD_DEFAULT;
    for (int i = start; i <= end + 1; i++) {
        AVPacket *p = i <= end ? d->all.units[i].pkt : NULL; /* NULL lets out what the decoder holds back */
        if (p && p->size == 0) continue;
        /* Non-reference pictures change no other picture: only the wanted ones are decoded. */
        if (p && by == BY_PTS)
            d->cx->skip_frame = find(d, index, n, p->pts) >= 0 ? AVDISCARD_DEFAULT : AVDISCARD_NONREF;
        if ((ret = avcodec_send_packet(d->cx, p)) < 0 && p && p->size > 19) damage = ret;
        while ((ret = avcodec_receive_frame(d->cx, d->frame)) >= 0) {
            int64_t number = first + (*total)++;
            int at = -1;
            if (by == BY_PTS) at = find(d, index, n, d->frame->pts);
            else
                for (size_t k = 0; k < n && at < 0; k++) at = index[k] == number ? (int)k : -1;
            if (d->frame->decode_error_flags || (d->frame->flags & AV_FRAME_FLAG_CORRUPT)) damage = AVERROR_INVALIDDATA;
            if (at >= 0 && damage) return fail(d, DAMAGED, "the data are damaged at or before this frame", damage);
            if (at >= 0 && (ret = convert(d, rgb[at])) < 0) return ret;
            got += at >= 0;
        }
    }
    return got;
}

/* Writes the frames `index[0..n]` (ascending, distinct, below `present`) to `rgb`, each of
 * width x height x 3 bytes. With `plain` every picture from the first packet on is decoded and
 * counted: the reference the tests compare with. On failure `*at` is the first frame of the group
 * that failed; on success with `plain` it is how many pictures there are. */
EXPORT int tsm_frames(struct tsm_decoder *d, const int64_t *index, uint8_t *const *rgb, size_t n, int plain, int64_t *at) {
    int64_t total = 0;
    if (plain || d->by == BY_OUTPUT) {
        int ret = decode(d, 0, d->all.num_units - 1, index, rgb, n, BY_OUTPUT, 0, &total);
        *at = ret < 0 || (size_t)ret < n ? index[ret < 0 ? 0 : ret] : total;
        return ret < 0 ? ret : (size_t)ret < n ? fail(d, DAMAGED, "the decoder gave fewer frames than before", 0) : 0;
    }
    for (size_t i = 0, j; i < n; i = j) {
        const struct picture *p = &d->all.pics[index[i]];
        int start = p->start, end = p->packet;
        int64_t first = index[i];
        for (j = i; j < n && d->all.pics[index[j]].start == start; j++)
            if (d->all.pics[index[j]].packet > end) end = d->all.pics[index[j]].packet;
        while (first > 0 && d->all.pics[first - 1].start == start) first--;
        int ret = decode(d, start, end, index + i, rgb + i, j - i, d->by, first, &total);
        /* A keyframe that is none (a wrong flag in the file): once more from the first packet. */
        if (ret >= 0 && (size_t)ret < j - i && start > 0 && d->by == BY_PTS)
            ret = decode(d, 0, end, index + i, rgb + i, j - i, d->by, 0, &total);
        *at = index[i];
        if (ret < 0) return ret;
        if ((size_t)ret < j - i) return fail(d, DAMAGED, "the decoder gave no picture for this frame", 0);
    }
    return 0;
}
