#!/usr/bin/env bash
# local_cluster.sh - a real multi-node Slurm cluster on ONE machine (no systemd, no cgroups, one user).
#   local_cluster.sh install            apt-get install what is missing (Debian 12 / Ubuntu)
#   local_cluster.sh start              install + configure + start; idempotent; waits for N idle nodes
#   local_cluster.sh stop               cancel jobs, end every daemon this script started, undo /etc changes
#   local_cluster.sh status             daemons, nodes, memory
#   local_cluster.sh env                shell lines to eval (SLURM_CONF, DB socket ...)
#   local_cluster.sh kill-node NODE [now]   SIGKILL one slurmd and its job steps (a "node failure"); Slurm notices
#                                     after ~27 s; `now` marks it DOWN at once (jobs are requeued within a second)
#   local_cluster.sh start-node NODE    bring that node back
#   local_cluster.sh clean              stop + delete the state directory
# Settings (environment):
set -u
LS_DIR=${LS_DIR:-${TMPDIR:-/var/tmp}/local_cluster}       # all state, logs, config: this folder only
LS_NODES=${LS_NODES:-4}                  # node1..nodeN
LS_CPUS=${LS_CPUS:-8}                    # CPUs each node declares (fake)
LS_MEM=${LS_MEM:-16000}                  # MB each node declares (fake)
LS_GPUS=${LS_GPUS:-4}                    # GPUs each node declares (fake), 0 = none
LS_ACCT=${LS_ACCT:-0}                    # 1: mariadb + slurmdbd (sacct works); 0: jobcomp/filetxt only
LS_UTS=${LS_UTS:-auto}                   # 1: each slurmd in its own UTS namespace, so `hostname` = node name
LS_PORT=${LS_PORT:-17000}                # slurmd N listens on LS_PORT+N; ctld LS_PORT+900, dbd +901, mysql +906
LS_DOWN=${LS_DOWN:-10}                   # SlurmdTimeout: seconds of silence before a node is DOWN
LS_USERSIG=${LS_USERSIG:-1}              # 1: preemption sends the --signal of the job first (0: SIGTERM only)
LS_WAIT=${LS_WAIT:-60}                   # seconds start waits for the nodes
LS_LIMITS=${LS_LIMITS:-0}                # 1 (needs LS_ACCT=1): limits are enforced; account "lab" with qos "normal", "small" (more than 2 nodes: refused), "patient" (more than 1: waits)
LS_ETC=${LS_ETC:-0}                      # 1: (root) link /etc/slurm/slurm.conf and add node names to /etc/hosts

export PATH="$PATH:/usr/sbin:/sbin"
D=$LS_DIR; RUN=$D/run; LOG=$D/log; ETC=$D/etc
ME=$(id -un); HOST=$(hostname -s)
HB="# >>> local_cluster"; HE="# <<< local_cluster"
export SLURM_CONF=$ETC/slurm.conf
if [ "$LS_UTS" = auto ]; then [ "$(id -u)" = 0 ] && unshare --uts true 2>/dev/null && LS_UTS=1 || LS_UTS=0; fi
say() { echo "local_cluster: $*"; }
die() { echo "local_cluster: $*" >&2; exit 1; }
# alive NAME: the pid in run/NAME.pid runs and is still the program that we started
alive() { local p; p=$(cat "$RUN/$1.pid" 2>/dev/null) || return 1; [ -n "$p" ] && [ -r /proc/$p/comm ] || return 1
  case "$1" in slurmd-*) set -- "$1" slurmd;; esac
  grep -q "^${2:-$1}" /proc/$p/comm; }
end() { # end NAME [SIGNAL]: TERM, wait 10 s, KILL
  alive "$1" || { rm -f "$RUN/$1.pid"; return 0; }
  local p i; p=$(cat "$RUN/$1.pid"); kill -"${2:-TERM}" "$p" 2>/dev/null
  for i in $(seq 100); do [ -d /proc/$p ] && ! grep -q '^State:.Z' /proc/$p/status 2>/dev/null || break; sleep 0.1; done
  [ -d /proc/$p ] && kill -KILL "$p" 2>/dev/null; rm -f "$RUN/$1.pid"; }
bg() { # bg NAME COMMAND...: start detached, output to log/NAME.out, pid to run/NAME.pid
  local n=$1; shift
  ( cd "$D" && exec setsid "$@" ) </dev/null >"$LOG/$n.out" 2>&1 &
  echo $! >"$RUN/$n.pid"; disown 2>/dev/null; }
until_ok() { # until_ok SECONDS COMMAND...
  local t=$(( SECONDS + $1 )); shift; while ! timeout 20 "$@" >/dev/null 2>&1; do [ $SECONDS -lt $t ] || return 1; sleep 0.1; done; }

install() {
  local need="munge slurmctld slurmd slurm-client"; [ "$LS_ACCT" = 1 ] && need="$need slurmdbd mariadb-server"
  local miss="" p; for p in $need; do dpkg -s "$p" >/dev/null 2>&1 || miss="$miss $p"; done
  [ -z "$miss" ] && return 0
  [ "$(id -u)" = 0 ] || die "missing packages:$miss (run: sudo apt-get install -y --no-install-recommends$miss)"
  # nothing must start by itself (matters where systemd runs)
  local pr=/usr/sbin/policy-rc.d made=0
  [ -e $pr ] || { printf '#!/bin/sh\nexit 101\n' >$pr; chmod +x $pr; made=1; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends $miss >/dev/null; local rc=$?
  [ $made = 1 ] && rm -f $pr
  [ $rc = 0 ] || die "apt-get failed"
}

configure() {
  mkdir -p "$RUN" "$LOG" "$ETC" "$D/ctld" "$D/dev" "$D/sock"; chmod 755 "$D" "$RUN" "$LOG" "$ETC"; chmod 711 "$D/sock"
  local i names="node[1-$LS_NODES]" host=$HOST gres="" grestype=""
  [ "$LS_UTS" = 1 ] && host="$names"
  if [ "$LS_GPUS" -gt 0 ]; then
    for i in $(seq 0 $((LS_GPUS-1))); do ln -sfn /dev/null "$D/dev/gpu$i"; done   # must stat() as a character device; the trailing digit is the index
    gres="Gres=gpu:$LS_GPUS"; grestype="GresTypes=gpu"
    echo "AutoDetect=off
NodeName=$names Name=gpu File=$D/dev/gpu[0-$((LS_GPUS-1))]" >"$ETC/gres.conf"
  else rm -f "$ETC/gres.conf"; fi
  local v; v=$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -1 | tr -d .)      # 2205, 2311, 2411 ...
  if [ "${v:-0}" -ge 2311 ]; then echo "CgroupPlugin=disabled" >"$ETC/cgroup.conf"; else rm -f "$ETC/cgroup.conf"; fi
  local acct
  if [ "$LS_ACCT" = 1 ]; then acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((LS_PORT+901))
AccountingStoragePass=$D/sock/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment,job_env,job_script"
    [ "$LS_GPUS" -gt 0 ] || acct=$(echo "$acct" | grep -v TRES=)
  else acct="AccountingStorageType=accounting_storage/none"; fi
  local limits="" maxtime=INFINITE
  if [ "$LS_LIMITS" = 1 ]; then limits="AccountingStorageEnforce=limits,qos
EnforcePartLimits=ALL"; maxtime=120; fi
  local ctlparm=""; [ "$LS_USERSIG" = 1 ] && ctlparm="SlurmctldParameters=preempt_send_user_signal"
  cat >"$ETC/slurm.conf.new" <<C
ClusterName=local
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$((LS_PORT+900))
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
AuthInfo=socket=$D/sock/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/ctld
SlurmdSpoolDir=$D/spool-%n
SlurmctldPidFile=$RUN/slurmctld.slurm.pid
SlurmdPidFile=$RUN/slurmd-%n.slurm.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
# --- no cgroups, no binding: works in any VM or container
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
LaunchParameters=enable_nss_slurm
# --- scheduling: react within a second
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$ctlparm
JobRequeue=1
JobFileAppend=0
# --- short timers
KillWait=5
SlurmdTimeout=$LS_DOWN
SlurmctldTimeout=10
BatchStartTimeout=10
MessageTimeout=10
TCPTimeout=2
InactiveLimit=0
WaitTime=10
MinJobAge=86400
CompleteWait=0
OverTimeLimit=0
UnkillableStepTimeout=60
# --- accounting
$acct
$limits
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.log
$grestype
NodeName=DEFAULT CPUs=$LS_CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$LS_CPUS ThreadsPerCore=1 RealMemory=$LS_MEM TmpDisk=0 $gres State=UNKNOWN
NodeName=$names NodeHostname=$host NodeAddr=127.0.7.[1-$LS_NODES] Port=$((LS_PORT+1))-$((LS_PORT+LS_NODES))
PartitionName=DEFAULT Nodes=ALL MaxTime=$maxtime DefaultTime=60 State=UP OverSubscribe=NO
PartitionName=train   Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=urgent  PriorityTier=100 PreemptMode=OFF
PartitionName=preempt PriorityTier=1  PreemptMode=REQUEUE GraceTime=5
PartitionName=tiny    PriorityTier=10 PreemptMode=OFF MaxNodes=1 MaxTime=10 DefaultTime=10
C
  cmp -s "$ETC/slurm.conf.new" "$ETC/slurm.conf" && rm "$ETC/slurm.conf.new" || mv "$ETC/slurm.conf.new" "$ETC/slurm.conf"
  if [ "$LS_ACCT" = 1 ]; then
    ( umask 077; cat >"$ETC/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$D/sock/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((LS_PORT+901))
SlurmUser=$ME
PidFile=$RUN/slurmdbd.slurm.pid
LogFile=$LOG/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((LS_PORT+906))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
C
    )
  fi
}

etc_on() { [ "$LS_ETC" = 1 ] && [ "$(id -u)" = 0 ] || return 0
  mkdir -p /etc/slurm; local f
  for f in slurm.conf gres.conf cgroup.conf; do
    [ -e "$ETC/$f" ] || continue
    if [ ! -e /etc/slurm/$f ] || [ -L /etc/slurm/$f ]; then ln -sfn "$ETC/$f" /etc/slurm/$f; fi
  done
  local i; etc_hosts_off
  { echo "$HB"; for i in $(seq "$LS_NODES"); do echo "127.0.7.$i node$i"; done; echo "$HE"; } >>/etc/hosts; }
etc_hosts_off() { [ -w /etc/hosts ] && grep -q "^$HB" /etc/hosts || return 0
  local t; t=$(mktemp); sed "/^$HB/,/^$HE/d" /etc/hosts >"$t"; cat "$t" >/etc/hosts; rm -f "$t"; }  # cat: /etc/hosts may be a bind mount
etc_off() { [ "$(id -u)" = 0 ] || return 0; local f
  for f in slurm.conf gres.conf cgroup.conf; do [ "$(readlink /etc/slurm/$f 2>/dev/null)" = "$ETC/$f" ] && rm -f /etc/slurm/$f; done
  etc_hosts_off; }

start_munge() { alive munged && return 0
  [ -s "$ETC/munge.key" ] || { ( umask 077; head -c 128 /dev/urandom >"$ETC/munge.key" ); }
  chmod 600 "$ETC/munge.key"; rm -f "$D/sock/munge.socket"* 
  bg munged munged --foreground --force --key-file="$ETC/munge.key" --socket="$D/sock/munge.socket" \
     --pid-file="$RUN/munged.self.pid" --log-file="$LOG/munged.log" --seed-file="$D/munged.seed" --num-threads=2
  until_ok 10 munge --socket="$D/sock/munge.socket" -n || die "munged did not start: see $LOG/munged.log"; }

start_db() { [ "$LS_ACCT" = 1 ] || return 0
  if ! alive mariadbd; then
    if [ ! -d "$D/mysql/mysql" ]; then
      mariadb-install-db --no-defaults --datadir="$D/mysql" --user="$ME" --auth-root-authentication-method=normal \
        --skip-test-db --skip-name-resolve >"$LOG/mariadb-install.log" 2>&1 || die "mariadb-install-db failed: $LOG/mariadb-install.log"
    fi
    bg mariadbd mariadbd --no-defaults --user="$ME" --datadir="$D/mysql" --socket="$D/sock/mysql.sock" --pid-file="$RUN/mariadbd.self.pid" \
      --bind-address=127.0.0.1 --port=$((LS_PORT+906)) --skip-name-resolve --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
      --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=2 --performance-schema=OFF --skip-log-bin --key-buffer-size=1M
    until_ok 30 mariadb --no-defaults -uroot --socket="$D/sock/mysql.sock" -e 'select 1' || die "mariadbd did not start: $LOG/mariadbd.out"
    mariadb --no-defaults -uroot --socket="$D/sock/mysql.sock" -e "create user if not exists slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm_acct.* to slurm@'127.0.0.1';" || die "grant failed"
  fi
  alive slurmdbd && return 0
  ( export SLURM_CONF=$ETC/slurmdbd.conf; bg slurmdbd slurmdbd -D )   # slurmdbd.conf is looked up beside SLURM_CONF
  until_ok 30 sacctmgr -n show cluster || die "slurmdbd did not answer: $LOG/slurmdbd.log"
  sacctmgr -n show cluster format=cluster | grep -qw local || sacctmgr -i add cluster local >/dev/null
  [ "$LS_LIMITS" = 1 ] || return 0
  sacctmgr -n show account lab format=account | grep -qw lab && return 0
  sacctmgr -i add account lab description=lab organization=lab >/dev/null &&
    sacctmgr -i add qos small >/dev/null && sacctmgr -i modify qos small set MaxTRESPerJob=node=2 Flags=DenyOnLimit >/dev/null &&
    sacctmgr -i add qos patient >/dev/null && sacctmgr -i modify qos patient set MaxTRESPerJob=node=1 MaxWall=5 >/dev/null &&
    sacctmgr -i add user "$ME" account=lab >/dev/null && sacctmgr -i modify user "$ME" set qos=normal,small,patient DefaultQOS=normal >/dev/null ||
    die "the account could not be made: $LOG/slurmdbd.log"; }

start_ctld() { alive slurmctld && return 0
  bg slurmctld slurmctld -D -f "$SLURM_CONF"
  until_ok 20 scontrol ping || die "slurmctld did not start: $LOG/slurmctld.log"; }

start_node() { alive "slurmd-$1" && return 0
  mkdir -p "$D/spool-$1"
  if [ "$LS_UTS" = 1 ]; then
    bg "slurmd-$1" unshare --uts sh -c 'hostname "$1"; exec slurmd -D -N "$1" -f "$2"' sh "$1" "$SLURM_CONF"
  else bg "slurmd-$1" slurmd -D -N "$1" -f "$SLURM_CONF"; fi; }

idle_n() { sinfo -h -N -p train -o '%T' | grep -cE '^(idle|allocated|mixed|completing)$'; }

start() { install; configure; etc_on; start_munge; start_db; start_ctld
  local i; for i in $(seq "$LS_NODES"); do start_node node$i; done
  local t=$(( SECONDS + LS_WAIT ))
  while [ "$(idle_n)" -lt "$LS_NODES" ]; do [ $SECONDS -lt $t ] || { sinfo -N -l; die "nodes are not up after $LS_WAIT s: see $LOG"; }; sleep 0.1; done
  say "$(idle_n) nodes up; SLURM_CONF=$SLURM_CONF"; }

steps() { # slurmstepd pids of this cluster [NODE]: slurmstepd takes the slurmd's environment and log
  local p; for p in $(pgrep -x slurmstepd); do
    { tr '\0' '\n' </proc/$p/environ; } 2>/dev/null | grep -qx "SLURM_CONF=$SLURM_CONF" || continue
    [ -z "${1:-}" ] || ls -l /proc/$p/fd 2>/dev/null | grep -q "slurmd-$1.log" || continue
    echo "$p"; done; }

kill_node() { alive "slurmd-$1" || die "$1 is not running"
  kill -KILL "$(cat "$RUN/slurmd-$1.pid")"; rm -f "$RUN/slurmd-$1.pid"
  local p c; for p in $(steps "$1"); do
    kill -STOP "$p"; for c in $(desc "$p"); do kill -KILL "$c" 2>/dev/null; done; kill -KILL "$p" 2>/dev/null; done
  [ "${2:-}" != now ] || scontrol update nodename="$1" state=down reason=local_cluster
  say "$1: slurmd and its steps killed"; }
desc() { local c; for c in $(pgrep -P "$1"); do desc "$c"; echo "$c"; done; }

stop() {
  if alive slurmctld && until_ok 3 scontrol ping; then
    scancel --quiet --full --state=RUNNING --state=PENDING --state=SUSPENDED --user="$ME" 2>/dev/null
    until_ok 15 sh -c '[ -z "$(squeue -h)" ]' || say "jobs still in the queue"
  fi
  local n p c; for n in "$RUN"/slurmd-*.pid; do [ -e "$n" ] || continue; n=${n##*/}; end "${n%.pid}"; done
  for p in $(steps); do for c in $(desc "$p"); do kill -KILL "$c" 2>/dev/null; done; kill -KILL "$p" 2>/dev/null; done
  end slurmctld; end slurmdbd; end mariadbd; end munged
  rm -f "$D/sock/"*; etc_off; say "stopped"; }

status() { local n p ok=0
  for n in munged mariadbd slurmdbd slurmctld $(seq -f 'slurmd-node%g' "$LS_NODES"); do
    [ "$LS_ACCT" = 1 ] || case $n in mariadbd|slurmdbd) continue;; esac
    if alive "$n"; then p=$(cat "$RUN/$n.pid"); printf '%-14s up   pid %-7s rss %6d kB\n' "$n" "$p" "$(awk '/VmRSS/{print $2}' /proc/$p/status)"
    else printf '%-14s DOWN\n' "$n"; ok=1; fi; done
  alive slurmctld && sinfo -N -o '%N %P %T %c %m %G %E'; return $ok; }

case "${1:-}" in
  install) install;; start) start;; stop) stop;; status) status;; restart) stop; start;;
  env) echo "export SLURM_CONF=$SLURM_CONF";;
  kill-node) kill_node "$2" "${3:-}";; start-node) start_node "$2";;
  clean) stop; rm -rf "$D";;
  *) sed -n '2,13p' "$0"; exit 2;;
esac
