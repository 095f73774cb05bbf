package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/preemptable/locker"
)

// maxBody bounds the part of a request that is read before its sender is authenticated. GitHub
// never sends more than 25 MB, and a pull_request delivery has about 25 KB.
const maxBody = 1 << 20

// delivery contains the data of one webhook delivery that this service needs.
type delivery struct {
	id     string
	repo   string // names the locks: the host and the number of the repository
	name   string // for people: owner and name, which can change
	pr     uint
	action string
	branch string
	head   string
	page   string // of the head commit, for people
	actor  string // the user that caused the event
	// updated is when GitHub last changed the pull request, according to the payload, to the
	// second.
	updated time.Time
	// arrived is when this replica accepted the delivery. It is set by worker.accept.
	arrived time.Time
}

// event describes the delivery to other replicas and in their logs. A job gets this text as the
// reason when this delivery takes its place. It contains the repository's name, because d.repo
// means nothing to people.
func (d delivery) event() string {
	return fmt.Sprintf("%s %.7s delivery %.8s of %s#%d", d.action, d.head, d.id, d.name, d.pr)
}

// spread is the number of places in the order for the deliveries of one second: 16 minutes in
// microseconds.
const spread = 1_000_000_000

// order returns the delivery's place among those of its pull request. It does not depend on when
// and at which replica the delivery arrives.
//
// The second in which GitHub changed the pull request counts first. It is not enough, because two
// pushes can fall into one second. A claim with the same order as one that still waits or holds is
// rejected, so the newer push would never be deployed. Within a second the time therefore counts at
// which GitHub created the delivery.
//
// A redelivery keeps its id and hence its order. It is rejected while the first delivery is at
// work, and runs once that has ended. The same is true of an event that GitHub delivers a second
// time for another webhook, for example for an app and for the repository, because the id is that
// of the event and not of the webhook.
//
// The time of creation comes from the delivery's id. In the examples of GitHub's documentation the
// id is a time-based UUID, but GitHub only promises that it is unique. With an id of another kind
// the arrival counts. Then the later to arrive of two pushes within one second wins, and a
// redelivery takes the place of its original.
func (d delivery) order() int64 {
	made := d.arrived
	if id, err := uuid.Parse(d.id); err == nil && id.Version() == 1 {
		made = time.Unix(id.Time().UnixTime())
	}
	age := made.Sub(d.updated).Microseconds()
	return d.updated.Unix()*spread + min(max(age, 0), spread-1)
}

// job returns the kind of job that the delivery asks for, or "" if it asks for none.
func (d delivery) job() string {
	switch d.action {
	case "opened", "reopened", "synchronize":
		return "deploy"
	case "closed":
		return "destroy"
	// The test checks that what a reviewer is going to see works.
	case "review_requested":
		return "test"
	default:
		return ""
	}
}

// labels returns the labels of the delivery's claim, which reach the claims that lose to it, in any
// replica. GitHub bounds the length of all these names, so they stay below the size that labels may
// have.
func (d delivery) labels() map[string]string {
	return map[string]string{"delivery": d.id, "commit": d.head, "url": d.page, "actor": d.actor}
}

// modes determine what the pushes to a branch do to a running job. The first pattern that matches
// counts.
type modes []struct {
	branch string // a pattern, or "" for every branch
	mode   locker.ClaimMode
}

// add parses the value of a flag: "let_finish", or "release/*=let_finish".
func (m *modes) add(text string) error {
	branch, name, ok := strings.Cut(text, "=")
	if !ok {
		branch, name = "", text
	}
	if _, err := path.Match(branch, ""); err != nil {
		return err
	}
	for _, mode := range []locker.ClaimMode{locker.Preempt, locker.LetFinish, locker.SkipIfBusy} {
		if mode.String() == name {
			*m = append(*m, struct {
				branch string
				mode   locker.ClaimMode
			}{branch, mode})
			return nil
		}
	}
	return errors.New("want preempt, let_finish or skip_if_busy")
}

// of returns the mode of a delivery's claim. Only pushes have a choice. A pull request that was
// closed needs no deployment any longer. A test is useless while a job runs that changes what the
// test looks at, and every deployment ends with the same test.
func (m modes) of(d delivery) locker.ClaimMode {
	switch d.job() {
	case "destroy":
		return locker.Preempt
	case "test":
		return locker.SkipIfBusy
	}
	for _, b := range m {
		if matches, _ := path.Match(b.branch, d.branch); matches || b.branch == "" {
			return b.mode
		}
	}
	return locker.Preempt
}

// newHandler serves POST /webhook and GET /healthz. It responds as soon as the worker has accepted
// a delivery, because GitHub hangs up after ten seconds, and a deployment takes longer. If from is
// not empty, deliveries of other kinds of webhooks are ignored.
func newHandler(secret []byte, from string, w *worker) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(rw http.ResponseWriter, _ *http.Request) {
		if w.stopping() {
			http.Error(rw, "shutting down", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(rw, "ok")
	})
	// Because the pattern contains the method, the mux responds with 405 to every other one.
	mux.HandleFunc("POST /webhook", func(rw http.ResponseWriter, r *http.Request) {
		d, status, err := readDelivery(rw, r, secret)
		switch {
		case err != nil:
			http.Error(rw, err.Error(), status)
		case d.job() == "", from != "" && from != r.Header.Get("X-GitHub-Hook-Installation-Target-Type"):
			rw.WriteHeader(http.StatusNoContent)
		case !w.accept(d):
			http.Error(rw, "shutting down", http.StatusServiceUnavailable)
		default:
			rw.WriteHeader(http.StatusAccepted)
		}
	})
	return mux
}

// readDelivery reads, authenticates and parses one request, in this order. Nothing is parsed before
// the signature has been verified. If there is an error, the status belongs to it. For an event
// other than pull_request it returns a delivery without a job.
func readDelivery(rw http.ResponseWriter, r *http.Request, secret []byte) (delivery, int, error) {
	body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, maxBody))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return delivery{}, http.StatusRequestEntityTooLarge, fmt.Errorf("body exceeds %d bytes", tooLarge.Limit)
	} else if err != nil {
		return delivery{}, http.StatusBadRequest, errors.New("cannot read the body")
	}
	if !validSignature(secret, body, r.Header.Get("X-Hub-Signature-256")) {
		return delivery{}, http.StatusUnauthorized, errors.New("X-Hub-Signature-256 is missing or wrong")
	}
	if r.Header.Get("X-GitHub-Event") != "pull_request" {
		return delivery{}, 0, nil
	}
	if mediaType, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); mediaType != "application/json" {
		return delivery{}, http.StatusUnsupportedMediaType, errors.New("set the webhook's content type to application/json")
	}

	var payload struct {
		Action      string `json:"action"`
		Number      uint   `json:"number"`
		PullRequest struct {
			Head struct {
				Ref string `json:"ref"`
				SHA string `json:"sha"`
			} `json:"head"`
			URL       string    `json:"html_url"`
			UpdatedAt time.Time `json:"updated_at"`
		} `json:"pull_request"`
		Repository struct {
			ID       int64  `json:"id"`
			FullName string `json:"full_name"`
			URL      string `json:"html_url"`
		} `json:"repository"`
		Sender struct {
			Login string `json:"login"`
		} `json:"sender"`
	}
	if err := json.Unmarshal(body, &payload); err != nil {
		return delivery{}, http.StatusBadRequest, errors.New("body is no pull_request payload")
	}
	d := delivery{
		id:      r.Header.Get("X-GitHub-Delivery"),
		repo:    lockName(payload.Repository.URL, payload.Repository.ID),
		name:    payload.Repository.FullName,
		pr:      payload.Number,
		action:  payload.Action,
		branch:  payload.PullRequest.Head.Ref,
		head:    payload.PullRequest.Head.SHA,
		page:    payload.PullRequest.URL + "/commits/" + payload.PullRequest.Head.SHA,
		actor:   payload.Sender.Login,
		updated: payload.PullRequest.UpdatedAt,
	}
	if d.id == "" || d.repo == "" || d.name == "" || d.pr == 0 || d.head == "" || d.updated.Unix() <= 0 {
		return delivery{}, http.StatusBadRequest, errors.New("delivery id, repository, number, head commit or updated_at is missing")
	}
	return d, 0, nil
}

// lockName returns the name of a repository in its locks, such as github.com/186853002. The
// repository's number stays the same when it is renamed or moved to another owner, and has no upper
// and lower case. The host distinguishes two servers. lockName returns "" if one of them is
// missing.
func lockName(page string, id int64) string {
	u, err := url.Parse(page)
	if err != nil || u.Host == "" || id <= 0 {
		return ""
	}
	return fmt.Sprintf("%s/%d", strings.ToLower(u.Host), id)
}

// readyTimeout bounds GET /ready. It is shorter than the second that Kubernetes waits by default.
const readyTimeout = 900 * time.Millisecond

// newOpsHandler serves GET /locks, the locks that are held or waited for in the whole database, and
// GET /ready, which reports whether this replica can acquire locks, according to ping, and accepts
// deliveries. It must not be reachable from the address for GitHub, because it requires no secret.
func newOpsHandler(list func(context.Context) ([]locker.LockStatus, error), ping func(context.Context) error, w *worker) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(rw http.ResponseWriter, r *http.Request) {
		if w.stopping() {
			http.Error(rw, "shutting down", http.StatusServiceUnavailable)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
		defer cancel()
		if err := ping(ctx); err != nil {
			// Errors of the library contain no password.
			http.Error(rw, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(rw, "ok")
	})
	mux.HandleFunc("GET /locks", func(rw http.ResponseWriter, r *http.Request) {
		holders, err := list(r.Context())
		if err != nil {
			// Errors of the library contain no password.
			http.Error(rw, err.Error(), http.StatusInternalServerError)
			return
		}
		rw.Header().Set("Content-Type", "application/json")
		// An empty list is encoded as [], not as null. If the reader is gone, the error does not
		// matter.
		_ = json.NewEncoder(rw).Encode(append([]locker.LockStatus{}, holders...))
	})
	return mux
}

const signaturePrefix = "sha256="

// validSignature reports whether header is the signature that GitHub computes for body: "sha256="
// and the hexadecimal HMAC-SHA256 of the raw bytes. The comparison takes the same time wherever the
// two differ.
func validSignature(secret, body []byte, header string) bool {
	digits, ok := strings.CutPrefix(header, signaturePrefix)
	if !ok {
		return false
	}
	got, err := hex.DecodeString(digits)
	return err == nil && hmac.Equal(got, mac(secret, body))
}

func mac(secret, body []byte) []byte {
	h := hmac.New(sha256.New, secret)
	h.Write(body)
	return h.Sum(nil)
}
