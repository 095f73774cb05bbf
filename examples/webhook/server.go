package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
)

// maxBody bounds what is read of one request before anything about its sender is known. GitHub itself never
// sends more than 25 MB; a pull_request delivery is about 25 KB.
const maxBody = 1 << 20

// delivery is what this service needs to know of one webhook delivery.
type delivery struct {
	id     string
	repo   string
	pr     uint
	action string
	head   string
}

// event names the delivery to other replicas and to whoever reads their logs: it is the text that a run is told
// when this delivery takes its place.
func (d delivery) event() string {
	return fmt.Sprintf("%s %.7s delivery %.8s", d.action, d.head, d.id)
}

// job says what the delivery asks for, or "" when it asks for nothing.
func (d delivery) job() string {
	switch d.action {
	case "opened", "reopened", "synchronize":
		return "deploy"
	case "closed":
		return "destroy"
	default:
		return ""
	}
}

// newHandler serves POST /webhook and GET /healthz. It answers a delivery as soon as the worker has accepted
// it: GitHub hangs up after ten seconds, and a deployment takes longer.
func newHandler(secret []byte, w *worker) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(rw http.ResponseWriter, _ *http.Request) {
		if w.stopping() {
			http.Error(rw, "shutting down", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(rw, "ok")
	})
	// The pattern's method makes the mux answer 405 to every other one.
	mux.HandleFunc("POST /webhook", func(rw http.ResponseWriter, r *http.Request) {
		d, status, err := readDelivery(rw, r, secret)
		switch {
		case err != nil:
			http.Error(rw, err.Error(), status)
		case d.job() == "":
			rw.WriteHeader(http.StatusNoContent)
		case !w.accept(d):
			http.Error(rw, "shutting down", http.StatusServiceUnavailable)
		default:
			rw.WriteHeader(http.StatusAccepted)
		}
	})
	return mux
}

// readDelivery reads, authenticates and parses one request, in this order: nothing is parsed before the
// signature has been found to be right. The status goes with the error. An event that is no pull_request gives
// a delivery without a job.
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
				SHA string `json:"sha"`
			} `json:"head"`
		} `json:"pull_request"`
		Repository struct {
			FullName string `json:"full_name"`
		} `json:"repository"`
	}
	if err := json.Unmarshal(body, &payload); err != nil {
		return delivery{}, http.StatusBadRequest, errors.New("body is no pull_request payload")
	}
	d := delivery{
		id:     r.Header.Get("X-GitHub-Delivery"),
		repo:   payload.Repository.FullName,
		pr:     payload.Number,
		action: payload.Action,
		head:   payload.PullRequest.Head.SHA,
	}
	if d.id == "" || d.repo == "" || d.pr == 0 || d.head == "" {
		return delivery{}, http.StatusBadRequest, errors.New("delivery id, repository, number or head commit is missing")
	}
	return d, 0, nil
}

const signaturePrefix = "sha256="

// validSignature reports whether header is the signature that GitHub computes for body: "sha256=" and the
// hexadecimal HMAC-SHA256 of the raw bytes. The comparison takes the same time wherever the two differ.
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
