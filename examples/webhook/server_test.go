package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/preemptable/locker"
)

const testSecret = "It's a Secret to Everybody"

// event is one line of what the service says.
type event struct {
	Time     time.Time `json:"time"`
	Kind     string    `json:"msg"`
	Repo     string    `json:"repo"`
	PR       uint      `json:"pr"`
	Job      string    `json:"job"`
	Event    string    `json:"event"`
	Delivery string    `json:"delivery"`
	Token    int64     `json:"token"`
	Reason   string    `json:"reason"`
	Addr     string    `json:"addr"`
}

// eventLog collects the events that are written to it.
type eventLog struct {
	mu    sync.Mutex
	lines []event
	seen  chan event // when not nil, gets every event too
}

func (l *eventLog) Write(line []byte) (int, error) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil {
		return 0, err
	}
	l.mu.Lock()
	l.lines = append(l.lines, e)
	l.mu.Unlock()
	if l.seen != nil {
		l.seen <- e
	}
	return len(line), nil
}

// of answers what happened to one delivery, in order: "received", "started 1", …
func (l *eventLog) of(delivery string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var kinds []string
	for _, e := range l.lines {
		if e.Delivery == delivery {
			kinds = append(kinds, e.Kind)
		}
	}
	return kinds
}

func (l *eventLog) find(delivery, kind string) event {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.lines {
		if e.Delivery == delivery && e.Kind == kind {
			return e
		}
	}
	return event{}
}

func testWorker(t *testing.T) (*worker, *eventLog) {
	t.Helper()
	provider, err := locker.NewLockProvider(locker.FakeLockProviderKind)
	require.NoError(t, err)
	return testWorkerOn(t, provider)
}

func testWorkerOn(t *testing.T, provider locker.LockProvider) (*worker, *eventLog) {
	t.Helper()
	events := &eventLog{}
	w, err := newWorker(provider, 10*time.Second, time.Second, slog.New(slog.NewJSONHandler(events, nil)))
	require.NoError(t, err)
	t.Cleanup(func() {
		w.stop()
		require.NoError(t, w.wait(context.Background()))
		require.NoError(t, closeProvider(provider))
	})
	return w, events
}

func recorded(t testing.TB, action string) []byte {
	t.Helper()
	body, err := os.ReadFile("../../testdata/webhooks/pull_request." + action + ".json")
	require.NoError(t, err)
	return body
}

// signed answers a request as GitHub sends it.
func signed(id string, body []byte) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/webhook", bytes.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("X-GitHub-Event", "pull_request")
	r.Header.Set("X-GitHub-Delivery", id)
	r.Header.Set("X-Hub-Signature-256", signaturePrefix+hex.EncodeToString(mac([]byte(testSecret), body)))
	return r
}

func statusOf(h http.Handler, r *http.Request) int {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	return rec.Code
}

func TestSignature(t *testing.T) {
	// The example from GitHub's documentation.
	const good = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
	for name, tc := range map[string]struct {
		header string
		want   bool
	}{
		"right":           {good, true},
		"missing":         {"", false},
		"prefix only":     {"sha256=", false},
		"no prefix":       {strings.TrimPrefix(good, "sha256="), false},
		"other algorithm": {"sha1=757107ea0eb2509fc211221cce984b8a37570b6d", false},
		"one digit wrong": {good[:len(good)-1] + "8", false},
		"cut off":         {good[:len(good)-2], false},
		"too long":        {good + "00", false},
		"no hex":          {"sha256=" + strings.Repeat("z", 64), false},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tc.want, validSignature([]byte(testSecret), []byte("Hello, World!"), tc.header))
		})
	}
	require.False(t, validSignature([]byte("another secret"), []byte("Hello, World!"), good))
	require.False(t, validSignature([]byte(testSecret), []byte("Hello, World"), good))
}

func TestHandler(t *testing.T) {
	const minimal = `{"action":"opened","number":7,"pull_request":{"head":{"sha":"ec26c3e57ca3"}},"repository":{"full_name":"o/r"}}`
	without := func(header string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Del(header) }
	}
	with := func(header, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(header, value) }
	}
	same := func(*http.Request) {}
	for name, tc := range map[string]struct {
		body string
		edit func(*http.Request)
		want int
		runs bool
	}{
		"opened":                   {string(recorded(t, "opened")), same, 202, true},
		"synchronize":              {string(recorded(t, "synchronize")), same, 202, true},
		"closed":                   {string(recorded(t, "closed")), same, 202, true},
		"reopened":                 {strings.Replace(minimal, "opened", "reopened", 1), same, 202, true},
		"charset given":            {minimal, with("Content-Type", "application/json; charset=utf-8"), 202, true},
		"largest body":             {minimal + strings.Repeat(" ", maxBody-len(minimal)), same, 202, true},
		"body too large":           {minimal + strings.Repeat(" ", maxBody-len(minimal)+1), same, 413, false},
		"signature missing":        {minimal, without("X-Hub-Signature-256"), 401, false},
		"signature wrong":          {minimal, with("X-Hub-Signature-256", "sha256="+strings.Repeat("0", 64)), 401, false},
		"ping, unsigned":           {minimal, func(r *http.Request) { with("X-GitHub-Event", "ping")(r); without("X-Hub-Signature-256")(r) }, 401, false},
		"ping":                     {minimal, with("X-GitHub-Event", "ping"), 204, false},
		"push":                     {minimal, with("X-GitHub-Event", "push"), 204, false},
		"action of no interest":    {strings.Replace(minimal, "opened", "labeled", 1), same, 204, false},
		"form encoded":             {"payload=%7B%7D", with("Content-Type", "application/x-www-form-urlencoded"), 415, false},
		"not JSON":                 {"{", same, 400, false},
		"empty":                    {"", same, 400, false},
		"negative number":          {strings.Replace(minimal, "7", "-7", 1), same, 400, false},
		"number missing":           {strings.Replace(minimal, `"number"`, `"other"`, 1), same, 400, false},
		"repository missing":       {strings.Replace(minimal, `"full_name"`, `"other"`, 1), same, 400, false},
		"head missing":             {strings.Replace(minimal, `"sha"`, `"other"`, 1), same, 400, false},
		"delivery id missing":      {minimal, without("X-GitHub-Delivery"), 400, false},
		"method GET":               {"", func(r *http.Request) { r.Method = http.MethodGet }, 405, false},
		"method PUT":               {minimal, func(r *http.Request) { r.Method = http.MethodPut }, 405, false},
		"unknown path":             {minimal, func(r *http.Request) { r.URL.Path = "/" }, 404, false},
		"health, although POST":    {minimal, func(r *http.Request) { r.URL.Path = "/healthz" }, 405, false},
		"signature of other bytes": {minimal, func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader(minimal + " ")) }, 401, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, events := testWorker(t)
				r := signed("72d3162e-cc78-11e3-81ab-4c9367dc0958", []byte(tc.body))
				tc.edit(r)
				require.Equal(t, tc.want, statusOf(newHandler([]byte(testSecret), w), r))
				require.NoError(t, w.wait(context.Background()))
				require.Equal(t, tc.runs, len(events.lines) > 0)
			})
		})
	}
}

func TestEventAndJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), w)
		require.Equal(t, 202, statusOf(h, signed("72d3162e-cc78-11e3-81ab-4c9367dc0958", recorded(t, "synchronize"))))
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, 202, statusOf(h, signed("0a1b2c3d-cc78-11e3-81ab-4c9367dc0958", recorded(t, "closed"))))
		require.NoError(t, w.wait(t.Context()))

		require.Len(t, events.lines, 6)
		first, last := events.lines[2], events.lines[5]
		require.Equal(t, "finished", first.Kind)
		require.Equal(t, "synchronize ec26c3e delivery 72d3162e", first.Event)
		require.Equal(t, "deploy", first.Job)
		require.Equal(t, "Codertocat/Hello-World", first.Repo)
		require.EqualValues(t, 2, first.PR)
		require.Equal(t, "closed ec26c3e delivery 0a1b2c3d", last.Event)
		require.Equal(t, "destroy", last.Job)
		require.Positive(t, first.Token)
		require.Greater(t, last.Token, first.Token)
	})
}

// The older of two pushes is told to stop, and by whom; the newer one runs after it and finishes.
func TestNewerPushWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), w)
		require.Equal(t, 202, statusOf(h, signed("first000-1", recorded(t, "synchronize"))))
		synctest.Wait() // it works
		time.Sleep(2500 * time.Millisecond)
		require.Equal(t, 202, statusOf(h, signed("second00-2", recorded(t, "synchronize"))))
		require.NoError(t, w.wait(t.Context()))

		require.Equal(t, []string{"received", "started", "told to stop", "stopped"}, events.of("first000-1"))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("second00-2"))
		require.Contains(t, events.find("first000-1", "told to stop").Reason, "delivery second00")
		stopped, started := events.find("first000-1", "stopped"), events.find("second00-2", "started")
		require.False(t, started.Time.Before(stopped.Time), "two ran together")
		require.Greater(t, started.Token, stopped.Token)
	})
}

// A push that waits while the running job winds down leaves as soon as a newer one arrives.
func TestWaitingPushLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), w)
		for _, id := range []string{"first000", "second00", "third000"} {
			require.Equal(t, 202, statusOf(h, signed(id, recorded(t, "synchronize"))))
			synctest.Wait()
		}
		require.Equal(t, []string{"received", "left"}, events.of("second00"))
		require.Contains(t, events.find("second00", "left").Reason, "delivery third000")
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("third000"))
	})
}

// A job that winds down for longer than the preemption timeout has lost its lock meanwhile, and that is an error.
func TestOverrun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		provider, err := locker.NewLockProvider(locker.FakeLockProviderKind, locker.WithPreemptionTimeout(500*time.Millisecond))
		require.NoError(t, err)
		w, events := testWorkerOn(t, provider)
		for _, id := range []string{"first000", "second00"} {
			require.True(t, w.accept(delivery{id: id, repo: "o/r", pr: 1, action: "opened", head: "ec26c3e57ca3"}))
			synctest.Wait()
		}
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "told to stop", "stopped", "failed"}, events.of("first000"))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("second00"))
	})
}

// unfairProvider serves whoever asks first last.
type unfairProvider struct {
	locker.LockProvider
	asked atomic.Int64
}

func (p *unfairProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	time.Sleep(time.Second - time.Duration(p.asked.Add(1))*time.Millisecond)
	return p.LockProvider.LockKey(ctx, repo, pr)
}

// Of a burst it is the last to arrive that finishes, however long the claims take, and no pull request disturbs
// another.
func TestBurst(t *testing.T) {
	const pulls, pushes = 5, 40
	synctest.Test(t, func(t *testing.T) {
		provider, err := locker.NewLockProvider(locker.FakeLockProviderKind)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, closeProvider(provider)) })
		w, events := testWorkerOn(t, &unfairProvider{LockProvider: provider})
		for push := range pushes {
			for pr := range pulls {
				require.True(t, w.accept(delivery{
					id: fmt.Sprintf("%d-%d", pr, push), repo: "o/r", pr: uint(pr + 1), action: "synchronize", head: "ec26c3e57ca3",
				}))
			}
		}
		require.NoError(t, w.wait(t.Context()))
		for pr := range pulls {
			for push := range pushes - 1 {
				require.NotContains(t, events.of(fmt.Sprintf("%d-%d", pr, push)), "finished")
			}
			require.Equal(t, []string{"received", "started", "finished"}, events.of(fmt.Sprintf("%d-%d", pr, pushes-1)))
		}
		require.Empty(t, w.order.last, "turns are forgotten once they have been passed on")
	})
}

// failingProvider fails the first few who ask.
type failingProvider struct {
	locker.LockProvider
	failures atomic.Int64
}

func (p *failingProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	if p.failures.Add(-1) >= 0 {
		return 0, errors.New("out of order")
	}
	return p.LockProvider.LockKey(ctx, repo, pr)
}

// A delivery whose claim cannot be announced says so, and does not hold up the ones behind it.
func TestFailedClaimPassesTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		provider, err := locker.NewLockProvider(locker.FakeLockProviderKind)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, closeProvider(provider)) })
		failing := &failingProvider{LockProvider: provider}
		failing.failures.Store(2)
		w, events := testWorkerOn(t, failing)
		for i := range 3 {
			require.True(t, w.accept(delivery{id: fmt.Sprint(i), repo: "o/r", pr: 1, action: "opened", head: "ec26c3e57ca3"}))
		}
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "failed"}, events.of("0"))
		require.Equal(t, []string{"received", "failed"}, events.of("1"))
		require.Contains(t, events.find("1", "failed").Reason, "out of order")
		require.Equal(t, []string{"received", "started", "finished"}, events.of("2"))
	})
}

// The whole service over a real connection: it ends what runs and what waits, says why, and returns without an
// error.
func TestGracefulShutdown(t *testing.T) {
	ctx, shutdown := context.WithCancel(t.Context())
	defer shutdown()
	events := &eventLog{seen: make(chan event, 100)}
	getenv := func(key string) string { return map[string]string{"WEBHOOK_SECRET": testSecret}[key] }
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"-addr", "127.0.0.1:0", "-work", "1h", "-wind-down", "1ms"}, getenv, events, io.Discard)
	}()
	next := func() event {
		t.Helper()
		select {
		case e := <-events.seen:
			return e
		case err := <-ended:
			require.FailNow(t, "the service ended", "%v", err)
		case <-time.After(30 * time.Second):
			require.FailNow(t, "nothing happens")
		}
		return event{}
	}

	url := "http://" + next().Addr
	res, err := http.Get(url + "/healthz")
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, http.StatusOK, res.StatusCode)

	r := signed("72d3162e", recorded(t, "opened"))
	r.RequestURI = ""
	r.URL, err = r.URL.Parse(url + "/webhook")
	require.NoError(t, err)
	res, err = http.DefaultClient.Do(r)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, http.StatusAccepted, res.StatusCode)
	require.Equal(t, "received", next().Kind)
	require.Equal(t, "started", next().Kind)

	shutdown()
	select {
	case err := <-ended:
		require.NoError(t, err)
	case <-time.After(30 * time.Second):
		require.FailNow(t, "the service does not end")
	}
	require.Equal(t, []string{"received", "started", "told to stop", "stopped"}, events.of("72d3162e"))
	require.NotEmpty(t, events.find("72d3162e", "told to stop").Reason)
	_, err = http.Get(url + "/healthz")
	require.Error(t, err, "it still listens")
}

// Once shutdown has begun a delivery is refused, so that GitHub shows it as failed, and what waits leaves.
func TestStoppedWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), w)
		require.Equal(t, 200, statusOf(h, httptest.NewRequest(http.MethodGet, "/healthz", nil)))
		for _, id := range []string{"first000", "second00"} {
			require.Equal(t, 202, statusOf(h, signed(id, recorded(t, "opened"))))
			synctest.Wait()
		}
		w.stop()
		require.Equal(t, 503, statusOf(h, signed("third000", recorded(t, "opened"))))
		require.Equal(t, 503, statusOf(h, httptest.NewRequest(http.MethodGet, "/healthz", nil)))
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "told to stop", "stopped"}, events.of("first000"))
		require.Equal(t, []string{"received", "left"}, events.of("second00"))
		require.Equal(t, errShutdown.Error(), events.find("second00", "left").Reason)
		require.Empty(t, events.of("third000"))
	})
}

func TestWaitHasDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := testWorker(t)
		require.True(t, w.accept(delivery{id: "1", repo: "o/r", pr: 1, action: "opened", head: "ec26c3e57ca3"}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, w.wait(ctx), context.DeadlineExceeded)
	})
}

func TestConfig(t *testing.T) {
	const uri = "postgres://user:hunter2@localhost/db"
	env := func(key string) string {
		return map[string]string{"WEBHOOK_SECRET": testSecret, "WEBHOOK_POSTGRES_URI": uri}[key]
	}
	c, err := parseConfig(nil, env, io.Discard)
	require.NoError(t, err)
	require.Equal(t, uri, c.postgres)
	require.Equal(t, "127.0.0.1:8080", c.addr)

	_, err = parseConfig(nil, func(string) string { return "" }, io.Discard)
	require.ErrorContains(t, err, "WEBHOOK_SECRET")
	for _, args := range [][]string{{"-work", "-1s"}, {"-wind-down", "10s"}, {"unexpected"}} {
		_, err = parseConfig(args, env, io.Discard)
		require.Error(t, err, args)
	}

	var help bytes.Buffer
	_, err = parseConfig([]string{"-help"}, env, &help)
	require.Error(t, err)
	require.Contains(t, help.String(), "WEBHOOK_POSTGRES_URI")
	require.NotContains(t, help.String(), "hunter2")
	require.NotContains(t, help.String(), testSecret)
}
