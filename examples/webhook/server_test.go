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
	"github.com/preemptable/locker/internal/pgserver"
)

const testSecret = "It's a Secret to Everybody"

// event is one line of the service's events.
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
	Ops      string    `json:"ops"`
	Mode     string    `json:"mode"`
	By       string    `json:"by"`
	Outcome  string    `json:"outcome"`

	Conclusion string `json:"conclusion"`
	Summary    string `json:"summary"`
}

// eventLog collects the events that are written to it.
type eventLog struct {
	mu    sync.Mutex
	lines []event
	seen  chan event // if not nil, receives every event as well
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

// of returns the events of one delivery, in order: "received", "started", …, except for "reports".
func (l *eventLog) of(delivery string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var kinds []string
	for _, e := range l.lines {
		if e.Delivery == delivery && e.Kind != "reports" {
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
	return testWorkerOn(t, fakeProvider(t))
}

// fakeProvider creates a provider that is closed once the test, and the workers on it, have ended.
func fakeProvider(t *testing.T, options ...locker.LockProviderOption) *locker.FakeLockProvider {
	t.Helper()
	provider, err := locker.NewFakeProvider(options...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, provider.Close()) })
	return provider
}

func testWorkerOn(t *testing.T, provider locker.LockProvider) (*worker, *eventLog) {
	t.Helper()
	events := &eventLog{}
	w, err := newWorker(provider, nil, 10*time.Second, time.Second, slog.New(slog.NewJSONHandler(events, nil)))
	require.NoError(t, err)
	t.Cleanup(func() {
		w.stop()
		require.NoError(t, w.wait(context.Background()))
	})
	return w, events
}

func recorded(t testing.TB, action string) []byte {
	t.Helper()
	body, err := os.ReadFile("../../testdata/webhooks/pull_request." + action + ".json")
	require.NoError(t, err)
	return body
}

// push returns a recorded push as if it had been made now. In a bubble that is the time of the
// bubble.
func push(t testing.TB) []byte {
	t.Helper()
	const then = `"updated_at": "2019-05-15T15:20:33Z"`
	body := recorded(t, "synchronize")
	require.Equal(t, 1, bytes.Count(body, []byte(then)))
	return bytes.Replace(body, []byte(then), []byte(`"updated_at": "`+time.Now().UTC().Format(time.RFC3339)+`"`), 1)
}

// signed returns a request as GitHub sends it.
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
	// An example of GitHub's documentation.
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
	const minimal = `{"action":"opened","number":7,"pull_request":{"head":{"sha":"ec26c3e57ca3"},"updated_at":"2019-05-15T15:20:33Z"},"repository":{"id":5,"full_name":"o/r","html_url":"https://git.example/o/r"}}`
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
		"repository missing":       {strings.Replace(minimal, `"repository"`, `"other"`, 1), same, 400, false},
		"its name missing":         {strings.Replace(minimal, `"full_name"`, `"other"`, 1), same, 400, false},
		"its number missing":       {strings.Replace(minimal, `"id":5`, `"id":0`, 1), same, 400, false},
		"its host missing":         {strings.Replace(minimal, "https://git.example", "", 1), same, 400, false},
		"head missing":             {strings.Replace(minimal, `"sha"`, `"other"`, 1), same, 400, false},
		"updated_at missing":       {strings.Replace(minimal, `"updated_at"`, `"other"`, 1), same, 400, false},
		"updated_at no time":       {strings.Replace(minimal, "2019-05-15T", "yesterday ", 1), same, 400, false},
		"updated_at before 1970":   {strings.Replace(minimal, "2019", "1969", 1), same, 400, false},
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
				require.Equal(t, tc.want, statusOf(newHandler([]byte(testSecret), "", w), r))
				require.NoError(t, w.wait(context.Background()))
				require.Equal(t, tc.runs, len(events.lines) > 0)
			})
		})
	}
}

func TestEventAndJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		require.Equal(t, 202, statusOf(h, signed("72d3162e-cc78-11e3-81ab-4c9367dc0958", recorded(t, "synchronize"))))
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, 202, statusOf(h, signed("0a1b2c3d-cc78-11e3-81ab-4c9367dc0958", recorded(t, "closed"))))
		require.NoError(t, w.wait(t.Context()))

		first, last := events.find("72d3162e-cc78-11e3-81ab-4c9367dc0958", "finished"), events.find("0a1b2c3d-cc78-11e3-81ab-4c9367dc0958", "finished")
		require.Equal(t, "synchronize ec26c3e delivery 72d3162e of Codertocat/Hello-World#2", first.Event)
		require.Equal(t, "deploy", first.Job)
		require.Equal(t, "Codertocat/Hello-World", first.Repo)
		require.EqualValues(t, 2, first.PR)
		require.Equal(t, "closed ec26c3e delivery 0a1b2c3d of Codertocat/Hello-World#2", last.Event)
		require.Equal(t, "destroy", last.Job)
		require.Positive(t, first.Token)
		require.Greater(t, last.Token, first.Token)
	})
}

// The older of two pushes is notified, with the newer one as the reason. The newer one runs after
// it and finishes.
func TestNewerPushWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		require.Equal(t, 202, statusOf(h, signed("first000-1", push(t))))
		// The first job runs.
		synctest.Wait()
		time.Sleep(2500 * time.Millisecond)
		require.Equal(t, 202, statusOf(h, signed("second00-2", push(t))))
		require.NoError(t, w.wait(t.Context()))

		require.Equal(t, []string{"received", "started", "notified", "stopped"}, events.of("first000-1"))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("second00-2"))
		require.Contains(t, events.find("first000-1", "notified").Reason, "delivery second00")
		stopped, started := events.find("first000-1", "stopped"), events.find("second00-2", "started")
		require.False(t, started.Time.Before(stopped.Time), "two ran together")
		require.Greater(t, started.Token, stopped.Token)
	})
}

// A commit's report names the page of the newer commit. An event names the delivery that caused it.
func TestReports(t *testing.T) {
	const page = "https://github.com/Codertocat/Hello-World/pull/2/commits/"
	const head = "ec26c3e57ca3a959ca5aad62de7213c562f8c821"
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		heads := map[string]string{"first000": "1111111", "second00": "2222222", "third000": "3333333"}
		for _, id := range []string{"first000", "second00", "third000"} {
			require.Equal(t, 202, statusOf(h, signed(id, bytes.ReplaceAll(push(t), []byte(head), []byte(heads[id])))))
			synctest.Wait()
		}
		require.NoError(t, w.wait(t.Context()))
		reports := func(id string) [2]string {
			e := events.find(id, "reports")
			return [2]string{e.Conclusion, e.Summary}
		}
		require.Equal(t, [2]string{"cancelled", "superseded by " + page + "2222222"}, reports("first000"))
		require.Equal(t, [2]string{"cancelled", "superseded by " + page + "3333333"}, reports("second00"))
		require.Equal(t, [2]string{"success", "done"}, reports("third000"))
		require.Equal(t, "second00", events.find("first000", "notified").By)
		require.Equal(t, "third000", events.find("second00", "left").By)
	})
}

// The reports of errors that the other tests do not cause: see locker.Outcome.
func TestReportOfErrors(t *testing.T) {
	for err, want := range map[error][2]string{
		locker.ErrLockBusy:        {"skipped", "skipped: busy with another delivery"},
		locker.ErrLockTimeout:     {"timed_out", "had to wait for too long for another delivery"},
		locker.ErrMaxLockDuration: {"timed_out", "ran for too long"},
		locker.ErrStopRequested:   {"cancelled", "an operator has stopped it"},
		locker.ErrProviderClosed:  {"cancelled", "the service was shut down"},
		errors.Join(locker.ErrLockPreempted, locker.ErrLockLost): {"failure", "broken off, and another job may have run concurrently"},
		errors.New("no database"):                                {"failure", "failed"},
	} {
		conclusion, summary := report(err)
		require.Equal(t, want, [2]string{conclusion, summary}, "%v", err)
	}
}

// On a branch whose pushes let the running job finish, it does. Of the pushes that wait meanwhile
// the newest runs after it. Closing the pull request stops it anyway.
func TestLetFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		require.NoError(t, w.modes.add("chan*=let_finish"))
		w.duration = 25 * time.Minute // longer than the lock timeout
		h := newHandler([]byte(testSecret), "", w)
		for _, id := range []string{"first000", "second00", "third000"} {
			require.Equal(t, 202, statusOf(h, signed(id, push(t))))
			synctest.Wait()
		}
		require.Equal(t, []string{"received", "left"}, events.of("second00"))
		time.Sleep(25 * time.Minute)
		synctest.Wait()
		require.Equal(t, []string{"received", "started", "finished"}, events.of("first000"))
		require.Equal(t, []string{"received", "started"}, events.of("third000"))
		require.Equal(t, "let_finish", events.find("third000", "started").Mode)

		closed := bytes.Replace(push(t), []byte("synchronize"), []byte("closed"), 1)
		require.Equal(t, 202, statusOf(h, signed("closed00", closed)))
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "notified", "stopped"}, events.of("third000"))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("closed00"))
	})
}

// A test is skipped while a deployment runs, and does not stop it. Alone it runs.
func TestSkipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		review := func(id string) {
			body := bytes.Replace(push(t), []byte("synchronize"), []byte("review_requested"), 1)
			require.Equal(t, 202, statusOf(h, signed(id, body)))
			synctest.Wait()
		}
		require.Equal(t, 202, statusOf(h, signed("first000", push(t))))
		synctest.Wait()
		review("review00")
		require.Equal(t, []string{"received", "skipped"}, events.of("review00"))
		skipped := events.find("review00", "skipped")
		require.Equal(t, "first000", skipped.By)
		require.Equal(t, "skip_if_busy", skipped.Mode)
		require.Equal(t, "test", skipped.Job)
		require.Contains(t, skipped.Reason, "delivery first000")
		require.Equal(t, "skipped", events.find("review00", "reports").Conclusion)
		require.Contains(t, events.find("review00", "reports").Summary, "https://github.com/Codertocat/Hello-World/pull/2/commits/ec26c3e")
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("first000"))
		review("review01")
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("review01"))
	})
}

func TestModes(t *testing.T) {
	var m modes
	for _, text := range []string{"release/*=let_finish", "dependabot/*=skip_if_busy", "release/1.0=preempt"} {
		require.NoError(t, m.add(text))
	}
	for _, text := range []string{"", "newest", "main=", "[=preempt", "ClaimMode(7)"} {
		require.Error(t, m.add(text), text)
	}
	for _, tc := range []struct {
		action, branch string
		want           locker.ClaimMode
	}{
		{"synchronize", "main", locker.Preempt},
		{"opened", "release/1.4", locker.LetFinish},
		{"reopened", "dependabot/go", locker.SkipIfBusy},
		{"synchronize", "release/1.0", locker.LetFinish}, // the first pattern counts
		{"closed", "release/1.4", locker.Preempt},
		{"review_requested", "release/1.4", locker.SkipIfBusy},
	} {
		require.Equal(t, tc.want, m.of(delivery{action: tc.action, branch: tc.branch}), "%v", tc)
	}
	require.NoError(t, m.add("preempt"))
	require.NoError(t, m.add("let_finish"))
	require.Equal(t, locker.Preempt, m.of(delivery{action: "opened", branch: "main"}))
}

// A push that waits while the running job winds down leaves as soon as a newer one arrives.
func TestWaitingPushLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		for _, id := range []string{"first000", "second00", "third000"} {
			require.Equal(t, 202, statusOf(h, signed(id, push(t))))
			synctest.Wait()
		}
		require.Equal(t, []string{"received", "left"}, events.of("second00"))
		require.Contains(t, events.find("second00", "left").Reason, "delivery third000")
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("third000"))
	})
}

// A job that winds down for longer than the preemption timeout has lost its lock meanwhile, which
// is an error.
func TestOverrun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		provider := fakeProvider(t, locker.WithPreemptionTimeout(500*time.Millisecond))
		w, events := testWorkerOn(t, provider)
		for _, id := range []string{"first000", "second00"} {
			require.True(t, w.accept(delivery{id: id, repo: "o/r", pr: 1, action: "opened", head: "ec26c3e57ca3", updated: time.Now()}))
			synctest.Wait()
		}
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "notified", "stopped", "failed"}, events.of("first000"))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("second00"))
	})
}

// unfairProvider serves the first call last.
type unfairProvider struct {
	locker.LockProvider
	asked atomic.Int64
}

func (p *unfairProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	time.Sleep(time.Second - time.Duration(p.asked.Add(1))*time.Millisecond)
	return p.LockProvider.LockKey(ctx, repo, pr)
}

// The last push of a burst finishes, and no other, however long the claims take. Pull requests do
// not affect each other.
func TestBurst(t *testing.T) {
	const pulls, pushes = 5, 40
	synctest.Test(t, func(t *testing.T) {
		provider := fakeProvider(t)
		w, events := testWorkerOn(t, &unfairProvider{LockProvider: provider})
		begin := time.Now().Truncate(time.Second)
		for push := range pushes {
			for pr := range pulls {
				require.True(t, w.accept(delivery{
					id: fmt.Sprintf("%d-%d", pr, push), repo: "o/r", pr: uint(pr + 1), action: "synchronize", head: "ec26c3e57ca3", updated: begin,
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
	})
}

// failingProvider fails the first few calls.
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

// A delivery whose claim cannot be announced is logged as failed, and does not delay the following
// ones.
func TestFailedClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		provider := fakeProvider(t)
		failing := &failingProvider{LockProvider: provider}
		failing.failures.Store(2)
		w, events := testWorkerOn(t, failing)
		for i := range 3 {
			require.True(t, w.accept(delivery{id: fmt.Sprint(i), repo: "o/r", pr: 1, action: "opened", head: "ec26c3e57ca3", updated: time.Now()}))
			synctest.Wait()
		}
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "failed"}, events.of("0"))
		require.Equal(t, []string{"received", "failed"}, events.of("1"))
		require.Contains(t, events.find("1", "failed").Reason, "out of order")
		require.Equal(t, []string{"received", "started", "finished"}, events.of("2"))
	})
}

// running is the whole service, which is reached over real connections.
type running struct {
	t        *testing.T
	url, ops string
	events   *eventLog
	shutdown context.CancelFunc
	ended    chan error
}

func startService(t *testing.T, env map[string]string, args ...string) *running {
	t.Helper()
	ctx, shutdown := context.WithCancel(t.Context())
	t.Cleanup(shutdown)
	s := &running{t: t, events: &eventLog{seen: make(chan event, 100)}, shutdown: shutdown, ended: make(chan error, 1)}
	getenv := func(key string) string {
		if key == "WEBHOOK_SECRET" {
			return testSecret
		}
		return env[key]
	}
	go func() {
		s.ended <- run(ctx, append([]string{"-addr", "127.0.0.1:0"}, args...), getenv, s.events, io.Discard)
	}()
	up := s.next()
	s.url, s.ops = "http://"+up.Addr, "http://"+up.Ops
	return s
}

// next returns the next event other than "reports".
func (s *running) next() event {
	s.t.Helper()
	select {
	case e := <-s.events.seen:
		if e.Kind == "reports" {
			return s.next()
		}
		return e
	case err := <-s.ended:
		require.FailNow(s.t, "the service ended", "%v", err)
	case <-time.After(30 * time.Second):
		require.FailNow(s.t, "nothing happens")
	}
	return event{}
}

// post sends a delivery and requires that it is accepted.
func (s *running) post(id string, body []byte) {
	s.t.Helper()
	r := signed(id, body)
	r.RequestURI = ""
	var err error
	r.URL, err = r.URL.Parse(s.url + "/webhook")
	require.NoError(s.t, err)
	res, err := http.DefaultClient.Do(r)
	require.NoError(s.t, err)
	require.NoError(s.t, res.Body.Close())
	require.Equal(s.t, http.StatusAccepted, res.StatusCode)
}

func (s *running) get(url string) (status int, body []byte) {
	s.t.Helper()
	res, err := http.Get(url)
	require.NoError(s.t, err)
	defer res.Body.Close()
	body, err = io.ReadAll(res.Body)
	require.NoError(s.t, err)
	return res.StatusCode, body
}

// end shuts the service down and requires that it ends without an error.
func (s *running) end() {
	s.t.Helper()
	s.shutdown()
	select {
	case err := <-s.ended:
		require.NoError(s.t, err)
	case <-time.After(30 * time.Second):
		require.FailNow(s.t, "the service does not end")
	}
}

// The whole service, over a real connection: when it shuts down it ends the jobs that run and wait,
// logs the reason, and returns no error.
func TestGracefulShutdown(t *testing.T) {
	s := startService(t, nil, "-work", "1h", "-wind-down", "1ms")
	status, _ := s.get(s.url + "/healthz")
	require.Equal(t, http.StatusOK, status)
	s.post("72d3162e", recorded(t, "opened"))
	require.Equal(t, "received", s.next().Kind)
	require.Equal(t, "started", s.next().Kind)
	s.end()
	require.Equal(t, []string{"received", "started", "notified", "stopped"}, s.events.of("72d3162e"))
	require.NotEmpty(t, s.events.find("72d3162e", "notified").Reason)
	_, err := http.Get(s.url + "/healthz")
	require.Error(t, err, "it still listens")
}

// Recorded deliveries are sent byte for byte over real connections. GitHub delivers the push once
// more after the pull request was closed. It must not deploy the environment again.
func TestLateDelivery(t *testing.T) {
	const opened, pushed, closed = "72d3162e-cc78-11e3-81ab-4c9367dc0958", "72d31630-cc78-11e3-81ab-4c9367dc0958", "72d31640-cc78-11e3-81ab-4c9367dc0958"
	s := startService(t, nil, "-work", "1ms")
	for _, d := range []struct{ id, action string }{{opened, "opened"}, {pushed, "synchronize"}, {closed, "closed"}} {
		s.post(d.id, recorded(t, d.action))
		for s.next().Kind != "finished" {
		}
	}
	s.post(pushed, recorded(t, "synchronize"))
	require.Equal(t, "received", s.next().Kind)
	away := s.next()
	require.Equal(t, "outdated", away.Kind)
	require.Equal(t, pushed, away.Delivery)
	require.Contains(t, away.Reason, "closed ec26c3e delivery 72d31640", "it says what came before it")
	s.end()
	require.Equal(t, []string{"received", "started", "finished", "received", "outdated"}, s.events.of(pushed))
}

// While a job closes the environment a late push arrives. The job is not notified.
func TestLateDeliveryDisturbsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		require.Equal(t, 202, statusOf(h, signed("72d31640-cc78-11e3-81ab-4c9367dc0958", recorded(t, "closed"))))
		synctest.Wait()
		require.Equal(t, 202, statusOf(h, signed("72d31630-cc78-11e3-81ab-4c9367dc0958", recorded(t, "synchronize"))))
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("72d31640-cc78-11e3-81ab-4c9367dc0958"))
		require.Equal(t, []string{"received", "outdated"}, events.of("72d31630-cc78-11e3-81ab-4c9367dc0958"))
	})
}

// A redelivery of the delivery at work is rejected, at whichever replica it arrives. Once the work
// has ended, a redelivery runs it again.
func TestRedelivery(t *testing.T) {
	const id = "72d3162e-cc78-11e3-81ab-4c9367dc0958"
	synctest.Test(t, func(t *testing.T) {
		provider := fakeProvider(t)
		one, events := testWorkerOn(t, provider)
		two, others := testWorkerOn(t, provider)
		require.Equal(t, 202, statusOf(newHandler([]byte(testSecret), "", one), signed(id, recorded(t, "synchronize"))))
		synctest.Wait()
		for _, w := range []*worker{one, two} {
			require.Equal(t, 202, statusOf(newHandler([]byte(testSecret), "", w), signed(id, recorded(t, "synchronize"))))
			synctest.Wait()
		}
		require.NoError(t, one.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "received", "outdated", "finished"}, events.of(id))
		require.Equal(t, []string{"received", "outdated"}, others.of(id))
		require.Empty(t, others.find(id, "reports"), "it would replace the report of what is at work")

		require.Equal(t, 202, statusOf(newHandler([]byte(testSecret), "", two), signed(id, recorded(t, "synchronize"))))
		require.NoError(t, two.wait(t.Context()))
		require.Equal(t, []string{"received", "outdated", "received", "started", "finished"}, others.of(id))
	})
}

// GitHub delivers one push for an app and for a repository's webhook, with the same id,
// milliseconds apart and to two replicas. The second delivery stops no job. If every webhook has
// different ids, the second stops the first, unless one kind of webhook is ignored.
func TestSamePushTwice(t *testing.T) {
	const one, other = "72d3162e-cc78-11e3-81ab-4c9367dc0958", "72d4008e-cc78-11e3-81ab-4c9367dc0958" // 6 ms later
	for name, tc := range map[string]struct {
		from          string
		second        string // the id of the second delivery
		status        int
		first, events []string // of the first and of the second delivery
	}{
		"one id": {"", one, 202,
			[]string{"received", "started", "finished"}, []string{"received", "outdated"}},
		"ids of their own": {"", other, 202,
			[]string{"received", "started", "notified", "stopped"}, []string{"received", "started", "finished"}},
		"ids of their own, from apps alone": {"integration", other, 204,
			[]string{"received", "started", "finished"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				// This is 20 ms after the first id was created.
				time.Sleep(time.Until(time.Date(2014, 4, 25, 12, 52, 24, 600e6, time.UTC)))
				body := push(t)
				provider := fakeProvider(t)
				deliver := func(w *worker, kind, id string) int {
					r := signed(id, body)
					r.Header.Set("X-GitHub-Hook-Installation-Target-Type", kind)
					return statusOf(newHandler([]byte(testSecret), tc.from, w), r)
				}
				w, events := testWorkerOn(t, provider)
				v, others := testWorkerOn(t, provider)
				require.Equal(t, 202, deliver(w, "integration", one))
				time.Sleep(6 * time.Millisecond)
				require.Equal(t, tc.status, deliver(v, "repository", tc.second))
				require.NoError(t, w.wait(t.Context()))
				require.NoError(t, v.wait(t.Context()))
				require.Equal(t, tc.first, events.of(one))
				require.Equal(t, tc.events, others.of(tc.second))
			})
		})
	}
}

// A repository has one name in the locks, even after it was renamed or moved, and in whatever case
// it is written. On another host it has another name.
func TestLockName(t *testing.T) {
	const want = "github.com/186853002"
	require.Equal(t, want, lockName("https://github.com/Codertocat/Hello-World", 186853002))
	require.Equal(t, want, lockName("https://GitHub.com/codertocat/hello-world", 186853002))
	require.Equal(t, want, lockName("https://github.com/new-owner/new-name", 186853002))
	require.Equal(t, "git.example:8443/186853002", lockName("https://git.example:8443/Codertocat/Hello-World", 186853002))
	require.Empty(t, lockName("https://github.com/a/b", 0))
	require.Empty(t, lockName("/a/b", 1))
	require.Empty(t, lockName("https://%", 1))
}

// A push after the repository was renamed stops the work of one from before. A repository of the
// same name on another host does not.
func TestRenamedRepository(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		require.Equal(t, 202, statusOf(h, signed("before00", push(t))))
		synctest.Wait()
		elsewhere := bytes.ReplaceAll(push(t), []byte("github.com"), []byte("git.example"))
		require.Equal(t, 202, statusOf(h, signed("elsewher", elsewhere)))
		synctest.Wait()
		require.Equal(t, []string{"received", "started"}, events.of("before00"))
		time.Sleep(time.Second)
		renamed := bytes.ReplaceAll(push(t), []byte("Codertocat/Hello-World"), []byte("codertocat/goodbye"))
		require.Equal(t, 202, statusOf(h, signed("after000", renamed)))
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "notified", "stopped"}, events.of("before00"))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("after000"))
		require.Equal(t, []string{"received", "started", "finished"}, events.of("elsewher"))
	})
}

// Of two pushes within one second of GitHub's clock the newer one wins, by the time in its id, in
// whatever order they arrive. If the ids contain no time, the later to arrive wins.
func TestTwoPushesInOneSecond(t *testing.T) {
	for name, tc := range map[string]struct{ arriveFirst, arriveLast, wins string }{
		"in order":     {"72d3162e-cc78-11e3-81ab-4c9367dc0958", "72d3172e-cc78-11e3-81ab-4c9367dc0958", "72d3172e-cc78-11e3-81ab-4c9367dc0958"},
		"out of order": {"72d3172e-cc78-11e3-81ab-4c9367dc0958", "72d3162e-cc78-11e3-81ab-4c9367dc0958", "72d3172e-cc78-11e3-81ab-4c9367dc0958"},
		"random ids":   {"be0cd3f7-64c6-4f35-9d9e-1f4d0d2d2a11", "0f7c2b54-1d9f-4c3e-8d6c-7b0f2f2f9c01", "0f7c2b54-1d9f-4c3e-8d6c-7b0f2f2f9c01"},
		"no UUIDs":     {"second", "first", "first"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				// This is 20 ms after the ids were created.
				time.Sleep(time.Until(time.Date(2014, 4, 25, 12, 52, 24, 600e6, time.UTC)))
				w, events := testWorker(t)
				h := newHandler([]byte(testSecret), "", w)
				for _, id := range []string{tc.arriveFirst, tc.arriveLast} {
					require.Equal(t, 202, statusOf(h, signed(id, push(t))))
					synctest.Wait()
				}
				require.NoError(t, w.wait(t.Context()))
				loser := tc.arriveFirst
				if tc.wins == loser {
					loser = tc.arriveLast
				}
				require.Contains(t, events.of(tc.wins), "finished")
				require.NotContains(t, events.of(loser), "finished")
			})
		})
	}
}

func TestOrder(t *testing.T) {
	second := time.Date(2021, 5, 12, 20, 33, 43, 0, time.UTC)
	order := func(id string, updated, arrived time.Time) int64 {
		return delivery{id: id, updated: updated, arrived: arrived}.order()
	}
	// An example of GitHub's documentation. According to it, the delivery was sent at 20:33:44.
	const made = "58474f00-b361-11eb-836d-0e4f3503ccbe"
	base := second.Unix() * 1_000_000_000
	require.Equal(t, base+920_000, order(made, second, second.Add(time.Hour)), "the arrival does not count")
	require.Equal(t, order(made, second, second), order(made, second, second.Add(72*time.Hour)), "a redelivery has the same order")
	require.Equal(t, base+2_000_000, order("x", second, second.Add(2*time.Second)), "without a time in the id the arrival counts")
	require.Equal(t, base, order("x", second, second.Add(-time.Second)), "a clock that is behind")
	require.Equal(t, base+999_999_999, order("x", second, second.AddDate(7, 0, 0)), "long after")
	require.Less(t, order("x", second, second.AddDate(7, 0, 0)), order("x", second.Add(time.Second), second), "the second counts first")
}

func TestLocks(t *testing.T) {
	held := []locker.LockStatus{{Key: 1<<53 + 1, Repo: "o/r", PullRequest: 1, Event: "opened", Alive: true, Token: 42}}
	for name, tc := range map[string]struct {
		holders []locker.LockStatus
		err     error
		status  int
		want    string
	}{
		"some":    {held, nil, 200, `[{"Key":"9007199254740993","Repo":"o/r"`}, // JavaScript would round the number to …992
		"none":    {nil, nil, 200, "[]"},
		"failing": {nil, errors.New("no connection"), 500, "no connection"},
	} {
		t.Run(name, func(t *testing.T) {
			rec := httptest.NewRecorder()
			newOpsHandler(func(context.Context) ([]locker.LockStatus, error) { return tc.holders, tc.err }, nil, nil).
				ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/locks", nil))
			require.Equal(t, tc.status, rec.Code)
			require.Contains(t, rec.Body.String(), tc.want)
		})
	}
}

func TestReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := testWorker(t)
		ping := func(context.Context) error { return nil }
		ready := func() (int, string) {
			rec := httptest.NewRecorder()
			newOpsHandler(nil, ping, w).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/ready", nil))
			return rec.Code, rec.Body.String()
		}
		status, _ := ready()
		require.Equal(t, http.StatusOK, status)

		ping = func(context.Context) error { return errors.New("no connection") }
		status, body := ready()
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.Contains(t, body, "no connection")

		ping = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		start := time.Now()
		status, _ = ready()
		require.Equal(t, http.StatusServiceUnavailable, status)
		require.Equal(t, readyTimeout, time.Since(start))

		ping = func(context.Context) error { return nil }
		w.stop()
		status, _ = ready()
		require.Equal(t, http.StatusServiceUnavailable, status)
	})
}

// The same late delivery on PostgreSQL, and what operators see while a job runs.
func TestPostgres(t *testing.T) {
	instance, err := pgserver.Shared(t.Context())
	if errors.Is(err, pgserver.ErrNoBinaries) {
		t.Skip(err)
	}
	require.NoError(t, err)
	defer instance.Close()
	uri, drop, err := instance.NewDatabase(t.Context())
	require.NoError(t, err)
	defer drop()

	const pushed, closed = "72d31630-cc78-11e3-81ab-4c9367dc0958", "72d31640-cc78-11e3-81ab-4c9367dc0958"
	s := startService(t, map[string]string{"WEBHOOK_POSTGRES_URI": uri}, "-work", "1h", "-wind-down", "1ms", "-ops", "127.0.0.1:0")
	s.post(closed, recorded(t, "closed"))
	for s.next().Kind != "started" {
	}
	s.post(pushed, recorded(t, "synchronize"))
	for s.next().Kind != "outdated" {
	}
	status, body := s.get(s.ops + "/locks")
	require.Equal(t, http.StatusOK, status)
	var holders []locker.LockStatus
	require.NoError(t, json.Unmarshal(body, &holders))
	require.Len(t, holders, 1)
	require.Equal(t, "github.com/186853002", holders[0].Repo)
	require.EqualValues(t, 2, holders[0].PullRequest)
	require.Equal(t, "closed ec26c3e delivery 72d31640 of Codertocat/Hello-World#2", holders[0].Event)
	require.Equal(t, os.Getpid(), holders[0].PID)
	require.True(t, holders[0].Alive)
	require.False(t, holders[0].Waiting, "a delivery that was outdated does not wait")
	status, body = s.get(s.ops + "/ready")
	require.Equal(t, http.StatusOK, status, "%s", body)
	for _, path := range []string{"/locks", "/ready"} {
		status, _ = s.get(s.url + path)
		require.Equal(t, http.StatusNotFound, status, "not for GitHub's address")
	}
	s.end()
	_, err = http.Get(s.ops + "/locks")
	require.Error(t, err, "it still listens")
	require.Equal(t, []string{"received", "started", "notified", "stopped"}, s.events.of(closed))
}

// Once shutdown has begun a delivery is rejected, so that GitHub shows it as failed, and waiting
// deliveries leave.
func TestStoppedWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events := testWorker(t)
		h := newHandler([]byte(testSecret), "", w)
		require.Equal(t, 200, statusOf(h, httptest.NewRequest(http.MethodGet, "/healthz", nil)))
		for _, id := range []string{"first000", "second00"} {
			require.Equal(t, 202, statusOf(h, signed(id, push(t))))
			synctest.Wait()
		}
		w.stop()
		require.Equal(t, 503, statusOf(h, signed("third000", push(t))))
		require.Equal(t, 503, statusOf(h, httptest.NewRequest(http.MethodGet, "/healthz", nil)))
		require.NoError(t, w.wait(t.Context()))
		require.Equal(t, []string{"received", "started", "notified", "stopped"}, events.of("first000"))
		require.Equal(t, []string{"received", "left"}, events.of("second00"))
		require.Equal(t, errShutdown.Error(), events.find("second00", "left").Reason)
		require.Empty(t, events.of("third000"))
	})
}

func TestWaitHasDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := testWorker(t)
		require.True(t, w.accept(delivery{id: "1", repo: "o/r", pr: 1, action: "opened", head: "ec26c3e57ca3", updated: time.Now()}))
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
	require.Empty(t, c.modes)

	c, err = parseConfig([]string{"-mode", "release/*=let_finish", "-mode", "preempt"}, env, io.Discard)
	require.NoError(t, err)
	require.Len(t, c.modes, 2)

	_, err = parseConfig(nil, func(string) string { return "" }, io.Discard)
	require.ErrorContains(t, err, "WEBHOOK_SECRET")
	for _, args := range [][]string{{"-work", "-1s"}, {"-wind-down", "10s"}, {"-mode", "newest"}, {"unexpected"}} {
		_, err = parseConfig(args, env, io.Discard)
		require.Error(t, err, args)
	}
	inMemory := func(key string) string { return map[string]string{"WEBHOOK_SECRET": testSecret}[key] }
	_, err = parseConfig([]string{"-ops", "127.0.0.1:0"}, inMemory, io.Discard)
	require.ErrorContains(t, err, "-ops needs PostgreSQL")

	var help bytes.Buffer
	_, err = parseConfig([]string{"-help"}, env, &help)
	require.Error(t, err)
	require.Contains(t, help.String(), "WEBHOOK_POSTGRES_URI")
	require.NotContains(t, help.String(), "hunter2")
	require.NotContains(t, help.String(), testSecret)
}
