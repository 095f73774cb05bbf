package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// guard is a shell that outlives this process, in whatever way it ends. The shell then kills the
// server and removes its folder. It reads the server's process ID, 0 while there is none, from a
// pipe whose other end only this process has.
type guard struct {
	cmd  *exec.Cmd
	pipe *os.File
}

const guardScript = `
trap '' HUP INT QUIT TERM
pid=0
while read -r line; do pid=$line; done
if [ "$pid" -gt 0 ]; then
	kill -KILL "$pid"
	sleep 0.2
fi
rm -rf "$1"
`

func newGuard(dir string) (*guard, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/bin/sh", "-c", guardScript, "peers-guard", dir)
	cmd.Dir, cmd.Stdin = "/", r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = r.Close()
	if err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("guard: %w", err)
	}
	return &guard{cmd, w}, nil
}

func (g *guard) running(pid int) { _, _ = fmt.Fprintln(g.pipe, pid) }

func (g *guard) dismiss() error {
	_ = g.pipe.Close()
	_ = g.cmd.Wait()
	return nil
}

// memoryOf returns the memory of a process and of those that it has started. Pages that they share
// are counted once. It returns 0 if there is no /proc.
func memoryOf(pid int) int64 {
	total := pss(pid)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		// The program's name, in parentheses, may contain anything.
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(pid) {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			total += pss(child)
		}
	}
	return total
}

// pss returns the proportional set size of one process, in bytes.
func pss(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "Pss:" {
			kib, _ := strconv.ParseInt(fields[1], 10, 64)
			return kib << 10
		}
	}
	return 0
}
