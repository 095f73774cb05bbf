// Tenlines is the program that make size measures.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/preemptable/locker"
)

func main() {
	newLocker, err := locker.NewPostgresPreemptiveLockerFactory(os.Getenv("DATABASE_URL"), "", nil)
	if err != nil {
		panic(err)
	}
	err = newLocker("org/repo", 7, "push 1f2e3d4").Do(context.Background(), func(context.Context) error {
		fmt.Println("held")
		// Scanln returns when standard input ends.
		_, _ = fmt.Scanln()
		return nil
	})
	fmt.Println(err)
}
