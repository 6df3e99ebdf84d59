#!/usr/bin/env bash
# A SLURM cluster on this machine for tests: its own munged, one slurmctld, and a slurmd per node,
# all on loopback and below DIR. Two of them can run side by side.
#
#   cluster.sh start DIR [NODES]   start it (4 nodes), wait until every node is idle
#   cluster.sh hold DIR [NODES]    start it, print "ready", stop it when stdin ends
#   cluster.sh env DIR             print the line that makes sbatch, srun and scontrol use it
#   cluster.sh stop DIR            end every process of it, its jobs' too; DIR stays, for its logs
#
# Partitions: `low` (default; its jobs are pre-empted and requeued, GraceTime 10 s) and `high`.
# Each node has 4 CPUs and 8 GPUs, which are copies of /dev/null. Exits with 77 where it cannot run here.
set -euo pipefail

verb=${1:-} dir=${2:-} nodes=${3:-4}
PATH=$PATH:/usr/sbin:/sbin
skip() { echo "skipped: $*"; exit 77; }
die() { echo "error: $*" >&2; exit 1; }
case $verb in start | hold | env | stop) ;; *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 64 ;; esac
[ -n "$dir" ] || die "no folder given"
case $verb in
  start | hold)
    for tool in slurmctld slurmd munged sbatch srun; do command -v $tool > /dev/null || skip "there is no $tool here"; done
    [ "$(id -u)" = 0 ] || skip "needs root"
    [ ! -e "$dir/run/pids" ] || die "$dir holds a cluster already; stop it, or give another folder"
    ;;
esac
mkdir -p "$dir"
dir=$(cd "$dir" && pwd -P)
export SLURM_CONF=$dir/slurm.conf

listening() { # is PORT taken? (column 2 of /proc/net/tcp is address:port in hex)
  local hex; hex=$(printf ':%04X' "$1")
  cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk -v hex="$hex" '$2 ~ hex"$" {found=1} END {exit !found}'
}

configure() { # writes the configuration for ports from $1 on
  local port
  for ((port = $1; port <= $1 + nodes; port++)); do ! listening "$port" || return 1; done
  cat > "$dir/slurm.conf" <<CONF
ClusterName=tsm
SlurmctldHost=localhost
SlurmctldPort=$1
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool/%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd.%n
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential lives: 120 s, unless it is told another time of 5 s or more.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
# Far above what a busy machine needs to answer, so that no node is lost by accident.
MessageTimeout=60
SlurmdTimeout=60
KillWait=5
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n[1-$nodes] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$(($1 + 1))-$(($1 + nodes))] CPUs=4 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  echo "NodeName=n[1-$nodes] Name=gpu File=$dir/gpu/gpu[0-7]" > "$dir/gres.conf"
}

daemon() { # daemon NAME COMMAND...: in the background, away from our terminal, its pid on file
  local name=$1; shift
  setsid "$@" < /dev/null >> "$dir/log/$name.out" 2>&1 &
  echo $! >> "$dir/run/pids"
}

alive() { # does every daemon that was started still run?
  local pid
  while read -r pid; do kill -0 "$pid" 2>/dev/null || return 1; done < "$dir/run/pids"
}

wait_for() { # wait_for SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.05; done
}

idle() { [ "$(sinfo -h -N -p low -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ]; }
up_or_dead() { idle || ! alive; }

start() {
  local attempt n
  for attempt in 1 2 3 4 5; do
    mkdir -p "$dir"/{run,state,log,munge,gpu}
    for n in $(seq "$nodes"); do mkdir -p "$dir/spool/n$n"; done
    for n in 0 1 2 3 4 5 6 7; do mknod "$dir/gpu/gpu$n" c 1 3 2>/dev/null || skip "cannot make device files"; done
    # Below the ports that the kernel gives to clients.
    until configure $((20000 + RANDOM % 12000)); do :; done
    : > "$dir/run/pids"
    (umask 077; head -c 64 /dev/urandom > "$dir/munge/key")
    daemon munged munged --foreground --force --num-threads=2 --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
      --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/munge/log"
    wait_for 20 test -S "$dir/munge/socket" || break
    daemon slurmctld slurmctld -D -f "$SLURM_CONF"
    for n in $(seq "$nodes"); do daemon "slurmd.n$n" slurmd -D -N "n$n" -f "$SLURM_CONF"; done
    if wait_for 60 up_or_dead && idle; then return; fi
    # Somebody else was quicker to take a port.
    if ! grep -qs 'Address already in use' "$dir"/log/*; then break; fi
    stop
    rm -rf "$dir"/{run,state,log,spool}
  done
  tail -n 5 "$dir"/log/* "$dir"/munge/log >&2 || true
  stop
  die "the cluster did not start; its logs are in $dir/log"
}

members() { # members jobs|daemons: pids that belong to this cluster
  local file comm
  # An unreadable or vanished process is none of ours.
  for file in $(grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null); do
    comm=$(cat "${file%environ}comm" 2>/dev/null) || continue
    case $1:$comm in
      daemons:munged | daemons:slurmctld | daemons:slurmscriptd | daemons:slurmd | jobs:slurmstepd) ;;
      *:munged | *:slurmctld | *:slurmscriptd | *:slurmd | *:slurmstepd | daemons:*) continue ;;
      # Not a shell in which somebody set SLURM_CONF to use the cluster.
      *) grep -qzs '^SLURM_JOB_ID=' "$file" || continue ;;
    esac
    echo "$file" | tr -cd '0-9\n'
  done
}
gone() { [ -z "$(members jobs)$(members daemons)" ]; }

stop() {
  [ -e "$dir/run/pids" ] || return 0
  local signal pids
  for signal in TERM KILL; do
    # The daemons first: none may start anything while its jobs are killed.
    pids=$(members daemons)
    [ -z "$pids" ] || kill -$signal $pids 2>/dev/null || true
    pids=$(members jobs)
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
    if wait_for 5 gone; then break; fi
  done
  gone || die "these processes of the cluster do not end: $(members jobs) $(members daemons)"
  rm -f "$dir/run/pids"
}

case $verb in
  start) start ;;
  stop) stop ;;
  env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
  hold)
    trap stop EXIT
    trap 'exit 130' INT TERM HUP
    start
    echo ready
    cat > /dev/null
    ;;
esac
