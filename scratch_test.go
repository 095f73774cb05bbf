package locker

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func cpuOf(pid int) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+2:]))
	u, _ := strconv.Atoi(f[11])
	s, _ := strconv.Atoi(f[12])
	return float64(u+s) / 100
}

func BenchmarkScratch(b *testing.B) {
	n, _ := strconv.Atoi(os.Getenv("N"))
	p := benchProvider(b, newDatabase(b))
	f, _ := NewPreemptiveLockerFactory(p)
	share(b, n, func(w int) error { return lockAndRelease(f, uint(w+1)) })
	pid := p.(*PostgresLockProvider).session.link.pid
	if os.Getenv("PERF") != "" && b.N > 1000 {
		c := exec.Command("perf", "record", "-g", "-o", "/tmp/perf.data", "-p", fmt.Sprint(pid), "sleep", "3")
		go func() { out, err := c.CombinedOutput(); fmt.Println(string(out), err) }()
	}
	var r0, r1 syscall.Rusage
	_ = syscall.Getrusage(0, &r0)
	c0 := cpuOf(pid)
	b.ResetTimer()
	start := time.Now()
	share(b, n, func(w int) error { return lockAndRelease(f, uint(w+1)) })
	el := time.Since(start)
	b.StopTimer()
	_ = syscall.Getrusage(0, &r1)
	us := func(t0, t1 syscall.Timeval) float64 { return float64(t1.Nano()-t0.Nano()) / 1e3 / float64(b.N) }
	b.ReportMetric(float64(b.N)/el.Seconds(), "cycles/s")
	b.ReportMetric((cpuOf(pid)-c0)*1e6/float64(b.N), "us-server")
	b.ReportMetric(us(r0.Utime, r1.Utime), "us-go-user")
	b.ReportMetric(us(r0.Stime, r1.Stime), "us-go-sys")
}
