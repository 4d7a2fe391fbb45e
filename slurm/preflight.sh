#!/usr/bin/env bash
# preflight.sh - looks at the node it runs on before a job uses it, and says what is wrong with it in one line each.
#   preflight.sh [FOLDER]            this node; FOLDER is where runs are written
#   srun -N4 --ntasks-per-node=1 preflight.sh /shared/runs      every node of an allocation
# launcher.preflight=true has every job do this first, and start again without the nodes that fail.
# Exit code 0: nothing found. 1: this node should be left out (launcher.exclude=NODE). Checks that cannot be made are skipped aloud.
set -u
folder=${1:-.}
# As Slurm calls it: that is what launcher.exclude wants.
node=${SLURMD_NODENAME:-$(hostname -s)}
bad=0
say() { echo "$node: $*"; }
fail() { bad=1; say "BAD $*"; }

# GPUs: the driver answers, every card of the job is there, no uncorrected memory error, no row waiting to be remapped.
if command -v nvidia-smi >/dev/null 2>&1; then
  if ! cards=$(timeout 30 nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader 2>&1); then
    fail "nvidia-smi: $(echo "$cards" | head -n1)"
  else
    found=$(echo "$cards" | wc -l)
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || [ "$found" -ge "$SLURM_GPUS_ON_NODE" ] || fail "$found GPUs, $SLURM_GPUS_ON_NODE expected"
    echo "$cards" | awk -F', *' '$2 ~ /^[1-9]/ {exit 1}' || fail "a GPU has uncorrected memory errors: nvidia-smi -q -d ECC"
    pending=$(timeout 30 nvidia-smi --query-remapped-rows=remapped_rows.pending --format=csv,noheader 2>/dev/null | grep -c '^[1-9]')
    [ "$pending" = 0 ] || fail "$pending GPUs wait for a reset to remap memory rows"
  fi
else
  say "no nvidia-smi: GPUs not looked at"
fi

# Disk: a megabyte written, flushed and read back; room for at least a gigabyte.
if probe=$(mktemp "$folder/.preflight-$node-XXXXXX" 2>/dev/null); then
  timeout 60 dd if=/dev/zero of="$probe" bs=1M count=1 conv=fsync status=none || fail "$folder cannot be written within 60 s"
  [ "$(stat -c %s "$probe" 2>/dev/null)" = 1048576 ] || fail "$folder lost what was written"
  rm -f "$probe"
  free=$(df -Pk "$folder" | awk 'NR==2 {print $4}')
  [ "$free" -gt 1048576 ] || fail "$folder has $((free / 1024)) MiB left"
else
  fail "$folder cannot be written"
fi

# Clock: rows and heartbeats of different nodes are compared. The time of a shared file system is the reference.
if stamp=$(mktemp "$folder/.preflight-clock-$node-XXXXXX" 2>/dev/null); then
  drift=$(( $(date +%s) - $(stat -c %Y "$stamp") ))
  rm -f "$stamp"
  [ "${drift#-}" -le 5 ] || fail "the clock is $drift s off that of $folder"
fi

# Collectives: two processes on this node talk to each other, over NCCL where there are GPUs, else over gloo.
if [ "${PREFLIGHT_COLLECTIVE:-1}" = 1 ]; then
  timeout 120 "${PYTHON:-python3}" -m factory_train.slurm.collective >/dev/null 2>&1
  case $? in
    0) ;;
    3) say "no torch in ${PYTHON:-python3}: collectives not tried" ;;
    *) fail "two processes could not add a number: ${PYTHON:-python3} -m factory_train.slurm.collective" ;;
  esac
fi

# What else a site wants to be true of a node: launcher.setup=["export PREFLIGHT_COMMAND='...'"].
if [ -n "${PREFLIGHT_COMMAND:-}" ]; then
  timeout 120 bash -c "$PREFLIGHT_COMMAND" >/dev/null 2>&1 || fail "PREFLIGHT_COMMAND failed: $PREFLIGHT_COMMAND"
fi

[ "$bad" = 0 ] && say "ok"
exit "$bad"
