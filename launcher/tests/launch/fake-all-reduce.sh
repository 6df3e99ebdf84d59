#!/bin/sh
# The double of `tsm-trainer all-reduce --json`. It does what the name says under which it was started.
line() {
  printf '{"rank":%s,"world_size":%s,"host":"h","device":"cpu","bytes":8,"rounds":1,"seconds":0.5,"algbw_gb_s":2.0,"busbw_gb_s":3.0,"wrong":%s}\n' \
    "$RANK" "$WORLD_SIZE" "$1" | tee "$TSM_ALL_REDUCE_DIR/rank-$RANK.json"
}
case $(basename "$0") in
  right) line null ;;
  wrong) if [ "$RANK" = 1 ]; then line '"1 of 2 sums are wrong"'; exit 69; else sleep 1000; fi ;;
  dies) if [ "$RANK" = 1 ]; then echo 'error: no GPU can be used: the driver is gone' >&2; exit 69; else sleep 1000; fi ;;
  hangs) printf %s $$ >"$(dirname "$0")/pid$RANK.part"; mv "$(dirname "$0")/pid$RANK.part" "$(dirname "$0")/pid$RANK"; sleep 1000 ;;
  arguments) line "\"$* in $PWD, devices '$CUDA_VISIBLE_DEVICES', $SLURM_JOB_ID\"" ;;
esac
